"""matmul: products with 4-bit weights that are decoded on the way."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.check import check_weight
from pallas_kernels.matmul.batching import with_vmap
from pallas_kernels.scales import DoubleQuantScales


def matmul(
    x: jax.Array,
    packed: jax.Array,
    scales: jax.Array | DoubleQuantScales,
    codebook: jax.Array,
    *,
    block_size: int,
    transpose: bool = False,
    layer: jax.Array | int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiply by a rows-layout weight W [N, K]: x @ W.T, or with `transpose` x @ W (for dX).

    The weight is decoded to x's dtype or wider, and products accumulate in float32.

    Args:
        x: float [M, K]; with `transpose`, [M, N].
        packed: uint8 [N, K // 2], high nibble first; with `layer`, [L, N, K // 2].
        scales: float32 [N, K // block_size], or `DoubleQuantScales`; with `layer`, stacked too.
        codebook: float32 [16], the value of each code.
        block_size: weights that share a scale; it divides K.
        transpose: contract over N instead of K.
        layer: int scalar, the layer of a stack to multiply by, without a copy of its packed bytes
            where a kernel runs.
        implementation: None for the fastest that can run; "xla", "mosaic_gpu" or "triton".

    Returns:
        x's dtype, [M, N]; with `transpose`, [M, K].

    Raises:
        ValueError: shapes that do not fit, or an unknown implementation.
        NotImplementedError: the named implementation cannot run here.

    Example:
        >>> packed = jnp.full((1, 32), 0xFF, jnp.uint8)
        >>> codebook = jnp.linspace(-1, 1, 16)
        >>> matmul(jnp.ones((1, 64)), packed, jnp.ones((1, 1)), codebook, block_size=64)
        Array([[64.]], dtype=float32)
    """
    rows, columns = check_weight(packed, scales, codebook, block_size, layer)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating point and is {x.dtype}")
    contracted, letter = (rows, "N") if transpose else (columns, "K")
    if x.ndim != 2 or x.shape[1] != contracted:
        raise ValueError(f"x must be [M, {letter}] = [M, {contracted}] and has shape {x.shape}")
    how = {"block_size": block_size, "transpose": transpose}
    args = x, packed, scales, codebook

    def product(x, packed, scales, codebook, layer):
        args = x, packed, scales, codebook
        return dispatch.run("matmul", implementation, *args, **how, layer=layer)

    choice = dispatch.resolve("matmul", implementation, *args, **how, layer=layer)
    if choice.implementation == "xla":
        return product(*args, layer)
    return with_vmap(product, *args, layer)
