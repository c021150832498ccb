"""bitsandbytes' 8-bit weights in a checkpoint, read and written as they are.

A weight [out, in] is `<module>.weight` (int8), `<module>.SCB` (float32, the absmax of each row) and
`<module>.weight_format` (0: by rows). Source: bitsandbytes 0.50, nn/modules.py, Linear8bitLt.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.qtensor import QTensor

Read = Callable[[str], np.ndarray]


def int8_weights(tensors: Collection[str]) -> dict[str, frozenset[str]]:
    """Return the 8-bit weights among the tensors, each with the tensors that belong to it."""
    parts = (".weight", ".SCB", ".weight_format")
    held = {n.removesuffix(".SCB") for n in tensors if n.endswith(".SCB")}
    held = {n for n in held if f"{n}.weight" in tensors}
    return {f"{n}.weight": frozenset(n + p for p in parts if n + p in tensors) for n in held}


def int8_like(shape: tuple[int, ...], name: str, dtype: Any, threshold: float | None) -> QTensor:
    """Return a weight as a QTensor [in, out] of abstract arrays.

    Args:
        shape: [out, in], of the codes.
        dtype: which the weight had.
        threshold: of LLM.int8(); None multiplies in floating point.
    """
    if len(shape) != 2:
        raise ValueError(f"{name!r} is of 8 bits and has shape {list(shape)}, must be [out, in]")
    out, fan_in = shape
    abstract: Any = jax.ShapeDtypeStruct
    return QTensor(
        packed=abstract((out, fan_in), np.int8),
        scales=abstract((out, 1), np.float32),
        slice_shape=(fan_in, out),
        dtype=jnp.dtype(dtype),
        format="int8",
        block_size=fan_in,
        contract_axes=(0,),
        layout="rows",
        int8_threshold=threshold,
    )


def read_int8(read: Read, name: str, parts: Collection[str], like: QTensor) -> QTensor:
    """Read a weight that `int8_like` describes."""
    module = name.removesuffix(".weight")
    codes, scale = read(name), read(f"{module}.SCB")
    if codes.dtype != np.int8 or scale.shape != codes.shape[:1] or scale.dtype != np.float32:
        raise ValueError(
            f"{name!r} is {codes.dtype.name}{list(codes.shape)} with SCB {scale.dtype.name}"
            f"{list(scale.shape)}, must be int8 [out, in] with SCB float32 [out]"
        )
    if f"{module}.weight_format" in parts and np.any(order := read(f"{module}.weight_format")):
        raise ValueError(f"{name!r} has weight_format={order}; only 0, by rows, is read")
    leaves = [jnp.asarray(codes), jnp.asarray(scale[:, None])]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def write_int8(name: str, q: QTensor) -> dict[str, np.ndarray]:
    """Return the tensors of a weight [in, out], as bitsandbytes would save it as [out, in]."""
    module = name.removesuffix(".weight")
    return {
        name: np.asarray(q.packed),
        f"{module}.SCB": np.asarray(q.scales).reshape(-1),
        f"{module}.weight_format": np.asarray(0, np.uint8),
    }
