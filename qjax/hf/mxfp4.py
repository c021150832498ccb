"""MXFP4, in which OpenAI stores the experts of gpt-oss, decoded to floating point.

A weight of experts is `<name>_blocks`, uint8 [experts, out, in / 32, 16], and `<name>_scales`,
uint8 [experts, out, in / 32]: 32 values along `in` share a power of two, 2 ** (scale - 127), and
two 4-bit floats share a byte, the first in the low nibble. Source: OCP Microscaling Formats 1.0.
"""

from collections.abc import Collection

import jax.numpy as jnp
import numpy as np

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_TABLE = np.concatenate([_E2M1, -_E2M1])
_BLOCKS, _SCALES = "_blocks", "_scales"


def mxfp4_weights(tensors: Collection[str]) -> dict[str, tuple[str, str]]:
    """Return the weights in MXFP4 among the tensors, each with its blocks and its scales.

    Raises:
        ValueError: blocks without scales.
    """
    names = [name.removesuffix(_BLOCKS) for name in tensors if name.endswith(_BLOCKS)]
    for name in names:
        if name + _SCALES not in tensors:
            raise ValueError(f"{name + _BLOCKS!r} is in MXFP4 and has no {name + _SCALES!r}")
    return {name: (name + _BLOCKS, name + _SCALES) for name in names}


def decode_mxfp4(name: str, blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the weight bfloat16 [experts, in, out], which holds every value exactly.

    Raises:
        ValueError: shapes or dtypes that are not those of MXFP4.
    """
    if (
        blocks.dtype != np.uint8
        or scales.dtype != np.uint8
        or blocks.ndim != 4
        or blocks.shape != (*scales.shape, 16)
    ):
        raise ValueError(
            f"{name!r}: blocks {blocks.dtype.name}{list(blocks.shape)} and scales "
            f"{scales.dtype.name}{list(scales.shape)} must be uint8 [experts, out, in / 32, 16] "
            "and uint8 [experts, out, in / 32]"
        )
    experts, out, groups, _ = blocks.shape
    decoded = np.empty((experts, groups * 32, out), jnp.bfloat16)
    for i in range(experts):  # one at a time: float32 takes eight times the bytes of the blocks
        codes = np.stack([blocks[i] & 15, blocks[i] >> 4], axis=-1).reshape(out, groups, 32)
        with np.errstate(over="ignore"):  # to inf, which quantization refuses by name
            values = np.ldexp(_TABLE[codes], scales[i].astype(np.int32)[..., None] - 127)
        decoded[i] = values.reshape(out, groups * 32).T
    return decoded
