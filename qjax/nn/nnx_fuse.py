"""Several linear layers with one input as one layer, side by side, and back.

One product, one adapter product, fewer kernels. The joint layer keeps `sections`, the output
features of each, so that each keeps (or gets) an adapter of its own.
"""

import copy
import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.scales import decode_scales
from qjax.core.double_quant import DoubleQuant
from qjax.core.qtensor import QTensor
from qjax.core.scales import CLASSES, Scales, kernel_scales

_VARIABLES = ("kernel", "bias", "lora_a", "lora_b", "lora_magnitude")
_OTHER_SCALES = tuple(cls for cls in CLASSES if cls is not DoubleQuant)
# What must be equal in layers that become one.
_SHARED = ("in_features", "dtype", "param_dtype", "lora_config", "compute_dtype")


def fuse_linears(layers: Sequence[Any], names: Sequence[str]) -> Any:
    """Return one layer whose output is that of `layers`, concatenated.

    4-bit kernels have their rows of bytes concatenated. Each doubly quantized weight has an offset
    of its own, so their scales become float32 (4.5 bits a parameter); a float kernel that is
    quantized after it was fused has one offset and keeps 8 bits.

    Args:
        layers: `nnx.Linear`, or `LoraLinear` or `QuantLinear`; stacked ones too.
        names: of the layers, for errors.

    Raises:
        ValueError: layers of different classes, inputs, dtypes, adapters or formats, or a weight
            in the flat layout.
    """
    check_linears(layers, names)
    first = layers[0]
    fused = copy.copy(first)
    fused.sections = tuple(n for layer in layers for n in _sections(layer))
    fused.out_features = sum(layer.out_features for layer in layers)
    for name in _VARIABLES:
        if getattr(first, name, None) is None:
            continue
        values = [getattr(layer, name).get_raw_value() for layer in layers]
        if isinstance(values[0], QTensor):
            value: Any = _concatenate(values)
        else:
            value = jnp.concatenate(values, axis=-1)
        setattr(fused, name, getattr(first, name).replace(value))
    return fused


def check_linears(layers: Sequence[Any], names: Sequence[str]) -> None:
    """Raise ValueError where `fuse_linears` would."""
    first = layers[0]
    for layer, name in zip(layers, names):
        for field in ("__class__", *_SHARED):
            mine, its = getattr(first, field, None), getattr(layer, field, None)
            if mine != its:
                raise ValueError(f"{names[0]} and {name} differ in {field}: {mine} and {its}")
        if (layer.bias is None) != (first.bias is None):
            raise ValueError(f"only one of {names[0]} and {name} has a bias")
    weights = [layer.kernel.get_raw_value() for layer in layers]
    if not isinstance(weights[0], QTensor):
        return
    for q, name in zip(weights, names):
        for field in ("format", "block_size", "dtype"):
            mine, its = getattr(weights[0], field), getattr(q, field)
            if mine != its:
                raise ValueError(f"{names[0]} and {name} differ in {field}: {mine} and {its}")
        plain = q.layout == "rows" and q.contract_axes == (0,) and len(q.slice_shape) == 2
        if not plain or q.kind.bits != 4 or isinstance(q.scales, _OTHER_SCALES):
            raise ValueError(f"{name}: {q!r} has no rows of scaled blocks to put beside others")


def split_linear(layer: Any) -> list[Any]:
    """Undo `fuse_linears` (scales stay float32).

    Raises:
        ValueError: the layer was not fused.
    """
    if getattr(layer, "sections", None) is None:
        raise ValueError("split_linear: the layer was not made of several")
    parts = []
    ends = np.cumsum(layer.sections)
    for i, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        part = copy.copy(layer)
        part.sections, part.out_features = None, end - start
        for name in _VARIABLES:
            variable = getattr(layer, name, None)
            if variable is None:
                continue
            value = variable.get_raw_value()
            if isinstance(value, QTensor):
                value = _rows(value, start, end)
            elif name == "lora_a":
                rank = value.shape[-1] // len(layer.sections)
                value = value[..., i * rank : (i + 1) * rank]
            else:
                value = value[..., start:end]
            setattr(part, name, variable.replace(value))
        parts.append(part)
    return parts


def _concatenate(weights: Sequence[QTensor]) -> QTensor:
    """Concatenate the outputs of 4-bit kernels [in, out] with one input."""
    first = weights[0]
    return dataclasses.replace(
        first,
        packed=jnp.concatenate([q.packed for q in weights], axis=-2),
        scales=jnp.concatenate([_float_scales(q) for q in weights], axis=-2),
        slice_shape=(first.slice_shape[0], sum(q.slice_shape[1] for q in weights)),
    )


def _rows(q: QTensor, start: int, end: int) -> QTensor:
    return dataclasses.replace(
        q,
        packed=q.packed[..., start:end, :],
        scales=_float_scales(q)[..., start:end, :],
        slice_shape=(q.slice_shape[0], end - start),
    )


def _float_scales(q: QTensor) -> jax.Array:
    decode = _decode_slice
    for _ in q.batch_shape:
        decode = jax.vmap(decode)
    return decode(q.scales)


def _decode_slice(scales: Scales) -> jax.Array:
    return decode_scales(kernel_scales(scales))


def _sections(layer: Any) -> tuple[int, ...]:
    return getattr(layer, "sections", None) or (layer.out_features,)


def is_fused(module: nnx.Module | None) -> bool:
    """Whether a layer stands for several."""
    return getattr(module, "sections", None) is not None
