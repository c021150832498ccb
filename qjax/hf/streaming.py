"""The arrays of a model, read tensor by tensor: in float, in 4 bits as stored, or quantized."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qjax.core.blockwise import quantize
from qjax.core.qtensor import QTensor
from qjax.hf.gguf import GGUFFile
from qjax.hf.layout import Stored
from qjax.hf.safetensors import SafetensorsFolder

Checkpoint = SafetensorsFolder | GGUFFile


def read_float(source: Checkpoint, where: Stored, like: Any, sharding: Any = None) -> jax.Array:
    """Read an array in floating point, onto its shards.

    Args:
        like: shape of the whole array, stacked axes first, and dtype.
        sharding: None is the default device.
    """
    each = like.shape[len(where.stack) :]
    values = [_read(source, name, where, each) for name in where.names]
    values = [value.T if where.transposed else value for value in values]
    whole = np.stack(values).reshape(like.shape) if where.stack else values[0]
    if sharding is None:
        return jnp.asarray(whole, like.dtype)
    return jax.device_put(whole.astype(like.dtype), sharding)  # no device gets the whole


def packed_like(source: Checkpoint, where: Stored, shape: tuple[int, ...]) -> QTensor:
    """Describe a weight of which the checkpoint holds 4-bit bytes: a QTensor of abstract arrays."""
    each = shape[len(where.stack) :]
    found = []
    for name in where.names:
        q = source.packed_like(name)
        if q.slice_shape != each:
            raise ValueError(
                f"{source.path}: 4-bit tensor {name!r} has shape {list(q.slice_shape[::-1])}, "
                f"its config says {list(each[::-1])}"
            )
        found.append(q)
    if len(set(map(jax.tree.structure, found))) > 1:
        raise ValueError(
            f"{source.path}: 4-bit weights of different formats cannot be stacked; "
            "load with scan_layers=False"
        )
    stack = where.stack
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((*stack, *a.shape), a.dtype), found[0])


def read_packed(source: Checkpoint, where: Stored, sharding: Any = None) -> QTensor:
    """Read a weight of which the checkpoint holds 4-bit bytes, as they are."""
    found = [_put_slice(source.read_packed(name), where, sharding) for name in where.names]
    return _stack(found, where.stack, sharding)


def read_quantized(
    source: Checkpoint, where: Stored, like: QTensor, sharding: Any = None
) -> QTensor:
    """Read a weight and quantize each tensor as it arrives, on the default device.

    Args:
        like: of the whole weight, abstract: its shape, dtype, format and double quantization.
        sharding: a QTensor with that of each array, of the whole weight.
    """
    each = like.shape[len(where.stack) :]
    found = []
    for name in where.names:
        w = jnp.asarray(_read(source, name, where, each), like.dtype)
        q = quantize(w, like.config, (where.block_axis,), batch_ndim=w.ndim - 2, name=name)
        if where.transposed:  # the same bytes, described the other way round
            q = dataclasses.replace(q, slice_shape=q.slice_shape[::-1], contract_axes=(0,))
        found.append(jax.block_until_ready(_put_slice(q, where, sharding)))
    return _stack(found, where.stack, sharding)


def _read(source: Checkpoint, name: str, where: Stored, each: tuple[int, ...]) -> np.ndarray:
    value = source.read(name)
    expected = each[::-1] if where.transposed else each
    if value.shape != expected:
        raise ValueError(
            f"{source.path}: tensor {name!r} has shape {list(value.shape)}, "
            f"its config says {list(expected)}"
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        hint = (
            f"; 8-bit weights need {name.removesuffix('weight')}SCB" if value.dtype == "i1" else ""
        )
        raise ValueError(f"{source.path}: tensor {name!r} is {value.dtype}, must be floating{hint}")
    return value


def _put_slice(q: QTensor, where: Stored, sharding: Any) -> QTensor:
    """Put one of the tensors of a weight where its part of the whole will be."""
    if sharding is None:
        return q
    leading = len(where.stack)
    of_slice = jax.tree.map(
        lambda s: NamedSharding(s.mesh, PartitionSpec(*s.spec[leading:])), sharding
    )
    return jax.device_put(q, of_slice)


def _stack(found: Sequence[QTensor], stack: tuple[int, ...], sharding: Any) -> QTensor:
    if not stack:
        return found[0]
    q = jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape(*stack, *leaves[0].shape), *found)
    return q if sharding is None else jax.device_put(q, sharding)
