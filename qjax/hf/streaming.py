"""The arrays of a model, read tensor by tensor: in float, in 4 bits as stored, or quantized."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.blockwise import quantize
from qjax.core.qtensor import QTensor
from qjax.hf.gguf import GGUFFile
from qjax.hf.layout import Stored
from qjax.hf.safetensors import SafetensorsFolder

Checkpoint = SafetensorsFolder | GGUFFile


def read_float(source: Checkpoint, where: Stored, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Read an array in floating point.

    Args:
        shape: of the whole array, stacked axes first.
    """
    each = shape[len(where.stack) :]
    values = []
    for name in where.names:
        value = _read(source, name, where, each)
        values.append(value.T if where.transposed else value)
    if not where.stack:
        return jnp.asarray(values[0], dtype)
    return jnp.asarray(np.stack(values).reshape(shape), dtype)


def read_packed(source: Checkpoint, where: Stored, shape: tuple[int, ...]) -> QTensor:
    """Read a weight of which the checkpoint holds 4-bit bytes, as they are."""
    each = shape[len(where.stack) :]
    found = []
    for name in where.names:
        q = source.read_packed(name)
        if q.shape != each:
            raise ValueError(
                f"{source.path}: 4-bit tensor {name!r} has shape {list(q.shape[::-1])}, "
                f"its config says {list(each[::-1])}"
            )
        found.append(q)
    return _stack(found, where.stack, source)


def read_quantized(source: Checkpoint, where: Stored, like: QTensor) -> QTensor:
    """Read a weight and quantize each tensor as it arrives, on the device.

    Args:
        like: of the whole weight, abstract: its shape, dtype, format and double quantization.
    """
    each = like.shape[len(where.stack) :]
    found = []
    for name in where.names:
        w = jnp.asarray(_read(source, name, where, each), like.dtype)
        q = quantize(w, like.config, (where.block_axis,), batch_ndim=w.ndim - 2, name=name)
        if where.transposed:  # the same bytes, described the other way round
            q = dataclasses.replace(q, slice_shape=q.slice_shape[::-1], contract_axes=(0,))
        found.append(jax.block_until_ready(q))
    return _stack(found, where.stack, source)


def _read(source: Checkpoint, name: str, where: Stored, each: tuple[int, ...]) -> np.ndarray:
    value = source.read(name)
    expected = each[::-1] if where.transposed else each
    if value.shape != expected:
        raise ValueError(
            f"{source.path}: tensor {name!r} has shape {list(value.shape)}, "
            f"its config says {list(expected)}"
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{source.path}: tensor {name!r} is {value.dtype}, must be floating")
    return value


def _stack(found: Sequence[QTensor], stack: tuple[int, ...], source: Checkpoint) -> QTensor:
    if not stack:
        return found[0]
    if len({jax.tree.structure(q) for q in found}) > 1:
        raise ValueError(
            f"{source.path}: 4-bit weights of different formats cannot be stacked; "
            "load with scan_layers=False"
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape(*stack, *leaves[0].shape), *found)
