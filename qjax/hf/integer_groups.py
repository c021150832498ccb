"""GPTQ's and AWQ's 4-bit weights in a checkpoint: integers with a step and a zero point a group.

A weight [in, out] in groups of g inputs is `<module>.qweight`, `<module>.qzeros` (both int32, eight
codes in each, the first in the lowest bits) and `<module>.scales` (float [in / g, out]); it is
(code - zero) * scale, which is our "int4_asym" bit for bit.

- GPTQ: qweight [in / 8, out] packs eight inputs, qzeros [in / g, out / 8] eight outputs. Version 1
  stores the int32 of the zero points less 0x11111111, version 2 as they are. `<module>.g_idx` says
  the group of each input: in order, unless inputs were sorted ("act-order").
- AWQ (gemm): qweight [in, out / 8] and qzeros [in / g, out / 8] pack eight outputs, in the order
  0, 2, 4, 6, 1, 3, 5, 7.

Source: AutoAWQ 0.2.9, modules/linear/gemm.py; GPTQModel 7.7, nn_modules/qlinear/__init__.py.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.qtensor import QTensor
from qjax.core.scales import AffineScales
from qjax.hf.group_config import FORMAT, GroupConfig

_PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output in each four bits, from the lowest
_V1_OFFSET = np.uint32(0x11111111)

Read = Callable[[str], np.ndarray]  # a tensor by its name


def grouped_weights(tensors: Collection[str]) -> dict[str, frozenset[str]]:
    """Return the weights among the tensors, `<module>.weight`, each with what belongs to it."""
    modules = [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]
    return {
        f"{m}.weight": frozenset(m + part for part in _PARTS if m + part in tensors)
        for m in modules
    }


def grouped_like(shape: tuple[int, ...], name: str, config: GroupConfig, dtype: Any) -> QTensor:
    """Return a weight as a QTensor [in, out] of abstract arrays.

    Args:
        shape: of its qweight.
        name: `<module>.weight`.
        config: of the checkpoint.
        dtype: what the weight decodes to.
    """
    size = config.group_size
    if len(shape) != 2:
        raise ValueError(f"{name!r}: qweight has shape {list(shape)}, must have two axes")
    k, n = (shape[0] * 8, shape[1]) if config.method == "gptq" else (shape[0], shape[1] * 8)
    if k % size:
        raise ValueError(f"{name!r}: group_size={size} does not divide its {k} inputs")
    abstract: Any = jax.ShapeDtypeStruct
    groups = (n, k // size)
    return QTensor(
        packed=abstract((n, k // 2), np.uint8),
        scales=AffineScales(abstract(groups, np.float32), abstract(groups, np.uint8)),
        slice_shape=(k, n),
        dtype=jnp.dtype(dtype),
        format=FORMAT,
        block_size=size,
        contract_axes=(0,),
        layout="rows",
    )


def read_grouped(
    read: Read, name: str, parts: Collection[str], config: GroupConfig, like: QTensor
) -> QTensor:
    """Read a weight that `grouped_like` describes.

    Raises:
        ValueError: a part is missing, or of another shape or dtype than qweight says; scales that
            are not finite.
        NotImplementedError: groups that are not in order.
    """
    module = name.removesuffix(".weight")
    (k, n), groups = like.slice_shape, like.slice_shape[0] // like.block_size

    def part(suffix, shape, kind):
        if module + suffix not in parts:
            raise ValueError(f"{name!r} has no {module + suffix!r}")
        value = read(module + suffix)
        if value.shape != shape or not jnp.issubdtype(value.dtype, kind):
            raise ValueError(
                f"{module + suffix!r} is {value.dtype.name}{list(value.shape)}; groups of "
                f"{like.block_size} with 4 bits need {kind.__name__}{list(shape)}"
            )
        return value

    if config.method == "gptq":
        codes = _along_rows(part(".qweight", (k // 8, n), np.int32))
        if config.act_order or f"{module}.g_idx" in parts:
            _check_order(module, part(".g_idx", (k,), np.integer), like.block_size)
    else:
        codes = _along_columns(part(".qweight", (k, n // 8), np.int32), _AWQ_ORDER)
    zeros = part(".qzeros", (groups, n // 8), np.int32).view(np.uint32)
    # On whole words: a zero point of 0 was taken from its neighbour, and is given back.
    zeros = zeros + _V1_OFFSET if config.offset else zeros
    zeros = _along_columns(zeros, range(8) if config.method == "gptq" else _AWQ_ORDER)
    scales = part(".scales", (groups, n), jnp.floating).astype(np.float32)
    if not np.isfinite(scales).all():
        raise ValueError(f"{module + '.scales'!r} holds NaN or inf")
    codes = codes.T  # [out, in]
    packed = codes[:, 0::2] << 4 | codes[:, 1::2]
    leaves = (np.ascontiguousarray(a) for a in (packed, scales.T, zeros.T))
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(leaf) for leaf in leaves])


def _nibbles(words: np.ndarray) -> np.ndarray:
    """Return the eight codes of each word, uint8 [..., 8], from the lowest bits."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    return (words.view(np.uint32)[..., None] >> shifts & 15).astype(np.uint8)


def _along_rows(words: np.ndarray) -> np.ndarray:
    """Return codes [8 * rows, columns] of words [rows, columns] that pack rows."""
    return np.swapaxes(_nibbles(words), 1, 2).reshape(-1, words.shape[1])


def _along_columns(words: np.ndarray, order) -> np.ndarray:
    """Return codes [rows, 8 * columns] of words that pack columns, `order[i]` in four bits i."""
    return _nibbles(words)[..., np.argsort(order)].reshape(len(words), -1)


def _check_order(module: str, g_idx: np.ndarray, group_size: int) -> None:
    if not np.array_equal(g_idx, np.arange(len(g_idx)) // group_size):
        raise NotImplementedError(
            f"{module + '.g_idx'!r} is not in order: GPTQ with act-order (desc_act=True) sorts the "
            "inputs before grouping them, which is not read; use a checkpoint with desc_act=False"
        )
