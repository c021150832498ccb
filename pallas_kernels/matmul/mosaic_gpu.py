"""x @ dequantize(W).T on Hopper for M <= 128: the regimes of the Mosaic GPU kernels."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.matmul import decode_layout, mid_layout, mosaic_decode, mosaic_mid, tuned
from pallas_kernels.matmul.config import DecodeTiles, MidTiles
from pallas_kernels.matmul.config import candidates as estimated
from pallas_kernels.matmul.problem import Operands, Problem, describe
from pallas_kernels.scales import DoubleQuantScales

MAX_ROWS = 128
DTYPES = ("bfloat16", "float16")


def unsupported(
    x: jax.Array | jax.ShapeDtypeStruct,
    packed: jax.Array | jax.ShapeDtypeStruct,
    *_,
    block_size: int,
    transpose: bool = False,
    layer: jax.Array | None = None,
) -> str | None:
    """Why these kernels cannot run a call (the device apart), or None. Shapes as in `matmul`."""
    if transpose:
        return "these kernels do not contract over N (transpose=True)"
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
    transpose: bool = False,
    layer: jax.Array | None = None,
    config: DecodeTiles | MidTiles | None = None,
) -> jax.Array:
    """Multiply by a rows-layout weight, accumulated in float32, in a fixed order.

    Args:
        x: bfloat16 or float16 [M, K], 1 <= M <= 128.
        packed: uint8 [N, K // 2]; with `layer` [layers, N, K // 2], read in place.
        scales: float32 [N, K // block_size] or `DoubleQuantScales`; with `layer` stacked likewise
            (the table, the origin and the pitch may be shared by the layers).
        codebook: float32 [16].
        block_size: weights that share a scale; a power of two from 32 that divides K.
        transpose: must be False.
        layer: int32 scalar, the slice of a stacked weight.
        config: tiles; None takes the measured or estimated best.

    Returns:
        x's dtype, [M, N]. Codes are rounded to that dtype, and by `mosaic_mid` scales too.

    Raises:
        NotImplementedError: with the reason that `unsupported` gives.
    """
    reason = unsupported(x, packed, block_size=block_size, transpose=transpose)
    if reason is not None:
        raise NotImplementedError(f"mosaic_gpu: {reason}")
    problem, operands = describe(x, packed, scales, codebook, block_size, layer)
    sms = mosaic.multiprocessors()
    return build(problem, config or choose(problem, mosaic.device_kind(), sms), sms)(operands)


def build(
    problem: Problem, tiles: DecodeTiles | MidTiles, sms: int
) -> Callable[[Operands], jax.Array]:
    """The kernel of a problem with these tiles."""
    if isinstance(tiles, DecodeTiles):
        return mosaic_decode.build(problem, tiles, sms)
    return mosaic_mid.build(problem, tiles)


def choose(problem: Problem, kind: str, sms: int) -> DecodeTiles | MidTiles:
    """The measured tiles of a device kind, or the estimated best; they fit in shared memory."""
    return next(_choices(problem, kind, sms))


def candidates(problem: Problem) -> list[DecodeTiles | MidTiles]:
    """All tiles that fit in shared memory, the likely best first."""
    return list(dict.fromkeys(_choices(problem, mosaic.device_kind(), mosaic.multiprocessors())))


def _choices(problem: Problem, kind: str, sms: int) -> Iterator[DecodeTiles | MidTiles]:
    shape = problem.m, problem.n, problem.k
    tiles = [
        tuned.lookup(kind, *shape),
        *estimated(*shape, problem.block_size, sms, problem.double),
    ]
    return (t for t in tiles if t is not None and _fits(problem, t, sms))


def _fits(problem: Problem, tiles: DecodeTiles | MidTiles, sms: int) -> bool:
    if isinstance(tiles, DecodeTiles):
        scratch = decode_layout.Layout(problem, tiles, sms).scratch(tiles)
    else:
        scratch = mid_layout.Layout(problem, tiles).scratch(tiles)
    return mosaic.shared_bytes(scratch) <= mosaic.SHARED_BYTES
