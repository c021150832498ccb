"""x @ dequantize(W).T on Hopper for M <= 128: the regimes of the Mosaic GPU kernels."""

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.matmul import mosaic_decode
from pallas_kernels.matmul.config import DecodeTiles, choose_decode
from pallas_kernels.matmul.problem import describe
from pallas_kernels.scales import DoubleQuantScales

MAX_ROWS = 16
DTYPES = ("bfloat16", "float16")


def unsupported(
    x: jax.Array | jax.ShapeDtypeStruct,
    packed: jax.Array | jax.ShapeDtypeStruct,
    *,
    block_size: int,
) -> str | None:
    """Why these kernels cannot run a call (the device apart), or None. Shapes as in `matmul`."""
    dtype = jnp.dtype(x.dtype).name
    if dtype not in DTYPES:
        return f"x is {dtype}; the kernel multiplies in {' or '.join(DTYPES)}"
    if x.ndim != 2 or not 1 <= x.shape[0] <= MAX_ROWS:
        return f"x has shape {x.shape}; the kernel takes [M, K] with 1 <= M <= {MAX_ROWS}"
    if block_size < 32 or block_size & (block_size - 1):
        return f"block_size is {block_size}; the kernel takes powers of two from 32"
    if packed.dtype != jnp.uint8:
        return f"packed is {jnp.dtype(packed.dtype).name}; the kernel takes uint8"
    return None


def matmul(
    x: jax.Array,
    packed: jax.Array,
    scales: jax.Array | DoubleQuantScales,
    codebook: jax.Array,
    *,
    block_size: int,
    layer: jax.Array | None = None,
    config: DecodeTiles | None = None,
) -> jax.Array:
    """Multiply by a rows-layout weight, accumulated in float32, in a fixed order.

    Args:
        x: bfloat16 or float16 [M, K], 1 <= M <= 128.
        packed: uint8 [N, K // 2]; with `layer` [layers, N, K // 2], read in place.
        scales: float32 [N, K // block_size] or `DoubleQuantScales`; with `layer` stacked likewise.
        codebook: float32 [16].
        layer: int32 scalar, the slice of a stacked weight.
        config: tiles; None takes the measured or estimated best.

    Returns:
        x's dtype, [M, N]. Codes are rounded to that dtype, scales are not.

    Raises:
        NotImplementedError: with the reason that `unsupported` gives.
    """
    reason = unsupported(x, packed, block_size=block_size)
    if reason is not None:
        raise NotImplementedError(f"mosaic_gpu: {reason}")
    problem, operands = describe(x, packed, scales, codebook, block_size, layer)
    sms = mosaic.multiprocessors()
    tiles = config or choose_decode(problem.m, problem.n, problem.k, block_size, sms)
    return mosaic_decode.build(problem, tiles, sms)(operands)
