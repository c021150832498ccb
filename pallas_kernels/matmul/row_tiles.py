"""Few rows of x on a CPU: decode a cache-sized tile of weight rows, use it, forget it.

XLA's CPU backend writes a decoded weight out to memory and reads it back; a tile that stays in the
cache is about 5 times faster for one row (benchmarks/results/cpu.json). Bytes are not unzipped into
columns: the high nibbles meet the even columns of x, the low nibbles the odd ones.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.scales import DoubleQuantScales, decode_scales

TILE_WEIGHTS = 2**18  # 1 MB of float32: fastest of 2^17 to 2^24 on a 2-core AMD EPYC


def matmul(
    x: jax.Array,
    packed: jax.Array,
    scales: jax.Array | DoubleQuantScales,
    codebook: jax.Array,
    *,
    block_size: int,
    transpose: bool = False,
) -> jax.Array:
    """The product of `reference.matmul`, decoded and multiplied in float32."""
    scales = decode_scales(scales)
    rows, half = packed.shape
    # Tiles of one size, so that the last, which reaches back, repeats little.
    tile = -(-rows // -(-rows // min(rows, max(1, TILE_WEIGHTS // (2 * half)))))

    def decode(start):
        """The even and odd columns of a tile of weight rows, float32 [tile, K // 2] each."""
        codes = jax.lax.dynamic_slice_in_dim(packed, start, tile)
        scale = jax.lax.dynamic_slice_in_dim(scales, start, tile)[..., None]
        scale = jnp.broadcast_to(scale, (*scale.shape[:-1], block_size // 2))
        for nibble in (codes >> 4, codes & 15):
            values = _select(codebook, nibble)
            yield (values.reshape(scale.shape) * scale).reshape(codes.shape)

    product = _times_w if transpose else _times_w_transposed
    return product(x.astype(jnp.float32), decode, rows, half, tile).astype(x.dtype)


def _select(codebook, codes):
    """`codebook[codes]` by four levels of selects, in vector registers, where a gather is not."""
    values = [jnp.broadcast_to(codebook[i], codes.shape) for i in range(16)]
    for bit in range(4):
        is_set = codes & np.uint8(1 << bit) != 0
        values = [jnp.where(is_set, b, a) for a, b in zip(values[0::2], values[1::2], strict=True)]
    return values[0]


def _starts(rows: int, tile: int):
    """Number of tiles, and the first row of each: the last one reaches back to stay inside."""
    return -(-rows // tile), lambda i: jnp.minimum(i * tile, rows - tile)


def _times_w_transposed(x, decode, rows, half, tile):
    columns = x[:, 0::2], x[:, 1::2]
    count, start_of = _starts(rows, tile)

    def step(i, y):
        # [tile, M] = W_tile @ x.T: XLA's CPU dot is faster with the long operand on the left.
        even, odd = (_dot(w, c, 1, 1) for w, c in zip(decode(start_of(i)), columns, strict=True))
        return jax.lax.dynamic_update_slice_in_dim(y, even + odd, start_of(i), 0)

    return jax.lax.fori_loop(0, count, step, jnp.zeros((rows, x.shape[0]), x.dtype)).T


def _times_w(x, decode, rows, half, tile):
    xt = x.T
    count, start_of = _starts(rows, tile)

    def step(i, sums):
        start = start_of(i)
        fresh = start + jax.lax.broadcasted_iota(jnp.int32, (tile, 1), 0) >= i * tile
        part = jnp.where(fresh, jax.lax.dynamic_slice_in_dim(xt, start, tile), 0)
        return tuple(s + _dot(part, w, 0, 0) for s, w in zip(sums, decode(start), strict=True))

    zero = jnp.zeros((x.shape[0], half), x.dtype)
    even, odd = jax.lax.fori_loop(0, count, step, (zero, zero))
    return jnp.stack([even, odd], axis=-1).reshape(x.shape[0], 2 * half)


def _dot(a, b, a_axis, b_axis):
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())))
