"""The XLA implementation of matmul: decode the weight, then an ordinary dot."""

import functools

import jax

from pallas_kernels.matmul import reference, row_tiles
from pallas_kernels.stacked import take_layer

# On a CPU a tile loop beats decode-then-dot up to about this many rows of x. Of 4096 x 4096, 256
# rows are 1.4x faster in float32 and 1.2x slower in bfloat16. A decoded weight of 1536 x 576 stays
# in the cache: 8 rows gain 1.1x, 128 lose (2-core AMD EPYC).
CPU_TILE_MAX_ROWS, CPU_TILE_MAX_ROWS_SMALL = 128, 16
CPU_SMALL_WEIGHT = 2**21  # weights


def matmul(x, packed, scales, codebook, *, block_size, transpose=False, layer=None):
    """See `pallas_kernels.matmul`."""
    packed, scales = take_layer(packed, scales, layer)
    args = (x, packed, scales, codebook)
    options = {"block_size": block_size, "transpose": transpose}
    whole = functools.partial(reference.matmul, *args, **options)
    small = 2 * packed.size < CPU_SMALL_WEIGHT
    if x.shape[0] > (CPU_TILE_MAX_ROWS_SMALL if small else CPU_TILE_MAX_ROWS):
        return whole()
    tiles = functools.partial(row_tiles.matmul, *args, **options)
    return jax.lax.platform_dependent(cpu=tiles, default=whole)


def unsupported(*args, **options) -> None:
    """XLA runs every shape on every platform."""
