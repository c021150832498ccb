"""dequantize: 4-bit weights back to floating point."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.check import check_weight
from pallas_kernels.scales import DoubleQuantScales


def dequantize(
    packed: jax.Array,
    scales: jax.Array | DoubleQuantScales,
    codebook: jax.Array,
    *,
    block_size: int,
    dtype=jnp.bfloat16,
    layer: jax.Array | int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Decode a rows-layout weight: float32 `codebook[code] * scale`, then one rounding to `dtype`.

    Every implementation gives the same bits.

    Args:
        packed: uint8 [N, K // 2], high nibble first; with `layer`, [L, N, K // 2].
        scales: float32 [N, K // block_size], or `DoubleQuantScales`; with `layer`, stacked too.
        codebook: float32 [16], the value of each code.
        block_size: weights that share a scale; it divides K.
        dtype: of the result.
        layer: int scalar, the layer of a stack to decode, without a copy of its packed bytes where
            a kernel runs.
        implementation: None for the fastest that can run; "xla", "mosaic_gpu" or "triton".

    Returns:
        `dtype` [N, K].

    Raises:
        ValueError: shapes that do not fit, or an unknown implementation.
        NotImplementedError: the named implementation cannot run here.

    Example:
        >>> packed = jnp.full((1, 32), 0x0F, jnp.uint8)
        >>> codebook = jnp.linspace(-1, 1, 16)
        >>> dequantize(packed, jnp.ones((1, 1)), codebook, block_size=64)[0, :2]
        Array([-1, 1], dtype=bfloat16)
    """
    check_weight(packed, scales, codebook, block_size, layer)
    return dispatch.run(
        "dequantize",
        implementation,
        packed,
        scales,
        codebook,
        block_size=block_size,
        dtype=dtype,
        layer=layer,
    )
