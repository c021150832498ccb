"""Block scales as the kernels take them: plain float32, or double-quantized (QLoRA, section 3)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.lookup import lookup

SECOND_LEVEL_BLOCK = 256  # scales that share one second-level absmax


class DoubleQuantScales(NamedTuple):
    """Scales stored as 8-bit codes of a second quantization.

    The scale at row `n`, block `b` of this array is
    `table[codes[n, b]] * absmax[i // 256] + offset` in float32 (two roundings), where `i` is its
    flat position in the whole weight: `i = (origin[0] + n) * pitch + origin[1] + b`.

    Attributes:
        codes: uint8 [N, K // block_size].
        absmax: float32 [ceil(rows * pitch / 256)], of the whole weight.
        offset: float32 scalar.
        table: float32 [256], the 8-bit code table.
        origin: int32 [2], row and block at which a shard of a larger weight starts; None is 0, 0.
        pitch: int, blocks in a row of the whole weight; None is `codes.shape[-1]`.
    """

    codes: jax.Array
    absmax: jax.Array
    offset: jax.Array
    table: jax.Array
    origin: jax.Array | None = None
    pitch: int | None = None


def decode_scales(scales: jax.Array | DoubleQuantScales) -> jax.Array:
    """Return the float32 scales [N, K // block_size] of either form."""
    if not isinstance(scales, DoubleQuantScales):
        return scales
    codes, absmax, offset, table, origin, pitch = scales
    values = lookup(table, codes)
    if origin is None and pitch is None:  # the flat order is this array's own
        padding = -codes.size % SECOND_LEVEL_BLOCK
        groups = jnp.pad(values.reshape(-1), (0, padding)).reshape(-1, SECOND_LEVEL_BLOCK)
        products = (groups * absmax[:, None]).reshape(-1)[: codes.size].reshape(codes.shape)
        return add_rounded(products, offset)
    row = jax.lax.broadcasted_iota(jnp.int32, codes.shape, 0)
    block = jax.lax.broadcasted_iota(jnp.int32, codes.shape, 1)
    if origin is not None:
        row, block = row + origin[0], block + origin[1]
    group = (row * (pitch or codes.shape[-1]) + block) // SECOND_LEVEL_BLOCK
    return add_rounded(values * lookup(absmax, group), offset)


def add_rounded(product: jax.Array, offset: jax.Array) -> jax.Array:
    """Add with a rounding of its own, as bitsandbytes does: no fused multiply-add."""
    return jax.lax.optimization_barrier(product) + offset
