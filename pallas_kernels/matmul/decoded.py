"""matmul for many rows of x: the dequantize kernel, then XLA's own dot."""

import jax

from pallas_kernels.dequantize import triton


def matmul(x, packed, scales, codebook, *, block_size, transpose=False, layer=None):
    """See `pallas_kernels.matmul`."""
    w = triton.dequantize(
        packed, scales, codebook, block_size=block_size, dtype=x.dtype, layer=layer
    )
    # XLA would merge the products of one x (q, k and v, say) and first copy their weights together.
    x, w = jax.lax.optimization_barrier((x, w))
    contract = ((1,), (0,)) if transpose else ((1,), (1,))
    # cuBLAS accumulates 16-bit products in float32 and rounds once; asking for a float32 result
    # would write and read it in that type.
    return jax.lax.dot_general(x, w, (contract, ((), ())))


def unsupported(
    x, packed, scales, codebook, *, block_size, transpose=False, layer=None
) -> str | None:
    """Why these arguments cannot run, or None."""
    return triton.unsupported(
        packed, scales, codebook, block_size=block_size, dtype=x.dtype, layer=layer
    )
