"""x @ dequantize(W).T in plain jnp: the numerics spec of the matmul kernels."""

import jax
import jax.numpy as jnp

from pallas_kernels.dequantize.reference import dequantize
from pallas_kernels.scales import DoubleQuantScales


def matmul(
    x: jax.Array,
    packed: jax.Array,
    scales: jax.Array | DoubleQuantScales,
    codebook: jax.Array,
    *,
    block_size: int,
    transpose: bool = False,
) -> jax.Array:
    """Multiply by a rows-layout weight, decoded to x's dtype, accumulated in float32.

    Args:
        x: float [M, K]; with `transpose` [M, N] (the backward product dX = dY @ W).
        packed, scales, codebook, block_size: the weight [N, K], as `dequantize` takes it.

    Returns:
        x's dtype, [M, N]; with `transpose` [M, K].
    """
    w = dequantize(packed, scales, codebook, block_size=block_size, dtype=x.dtype)
    contract = ((1,), (0,)) if transpose else ((1,), (1,))
    y = jax.lax.dot_general(x, w, (contract, ((), ())), preferred_element_type=jnp.float32)
    return y.astype(x.dtype)
