"""Blockwise dequantization in plain jnp: what every implementation must equal bit for bit."""

import jax
import jax.numpy as jnp

from pallas_kernels.lookup import lookup
from pallas_kernels.packing import unpack
from pallas_kernels.scales import DoubleQuantScales, decode_scales


def dequantize(
    packed: jax.Array,
    scales: jax.Array | DoubleQuantScales,
    codebook: jax.Array,
    *,
    block_size: int,
    dtype=jnp.float32,
) -> jax.Array:
    """Decode a rows-layout weight: float32 `codebook[code] * scale`, then one rounding to `dtype`.

    Args:
        packed: uint8 [N, K // 2], high nibble first.
        scales: float32 [N, K // block_size], or `DoubleQuantScales`.
        codebook: float32 [16].

    Returns:
        `dtype` [N, K].
    """
    values = lookup(codebook, unpack(packed))
    scale = decode_scales(scales)
    blocks = values.reshape(*scale.shape, block_size) * scale[..., None]
    return blocks.reshape(values.shape).astype(dtype)
