"""Argument checks of the public ops: shapes and dtypes that no implementation could run."""

import jax
import jax.numpy as jnp

from pallas_kernels.scales import DoubleQuantScales


def check_block_size(block_size: int, columns: int) -> None:
    """Raise ValueError unless blocks of `block_size` tile rows of `columns` weights."""
    if block_size < 2 or block_size % 2:
        raise ValueError(f"block_size is {block_size}; it must be even and positive")
    if columns % block_size:
        raise ValueError(f"block_size is {block_size}, which does not divide K = {columns}")


def check_weight(
    packed: jax.Array,
    scales: jax.Array | DoubleQuantScales,
    codebook: jax.Array,
    block_size: int,
    layer: jax.Array | int | None,
) -> tuple[int, int]:
    """Check a rows-layout weight (a stack of them, with `layer`) and return its (N, K)."""
    rank = 2 if layer is None else 3
    stack = "" if layer is None else "L, "
    if packed.dtype != jnp.uint8:
        raise TypeError(f"packed must be uint8 and is {packed.dtype}")
    if packed.ndim != rank:
        raise ValueError(f"packed must be [{stack}N, K // 2] and has shape {packed.shape}")
    if packed.size == 0:
        raise ValueError(f"packed must not be empty and has shape {packed.shape}")
    if codebook.shape != (16,):
        raise ValueError(f"codebook must have 16 entries and has shape {codebook.shape}")
    rows, columns = packed.shape[-2], 2 * packed.shape[-1]
    check_block_size(block_size, columns)
    double = isinstance(scales, DoubleQuantScales)
    shape = scales.codes.shape if double else scales.shape
    expected = (*packed.shape[:-1], columns // block_size)
    if shape != expected:
        name = "scales.codes" if double else "scales"
        raise ValueError(
            f"{name} has shape {shape}; packed {packed.shape} in blocks of {block_size} "
            f"needs {expected}"
        )
    return rows, columns
