"""The kernel of packed caches where few queries share a key: no code is decoded by itself.

A key's step goes into the query. Values are summed up as codes, each times its step and its weight,
and the offsets apart from them. A tile is some rows of slots, and as many in each further pass.
Each row has a running maximum and sums of its own: threads exchange nothing but the logits before
the end.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.decode_attention.tiles import LOWEST, read, word_columns


def kernel(
    layer_ref,
    length_ref,
    q_ref,
    mask_ref,
    *refs,
    group,
    kv_heads,
    splits,
    scale,
    tiling,
    interpret,
):
    """See `triton.attend`: a program adds up its part of a head's slots."""
    sums_ref, tops_ref, totals_ref = refs[6:]
    slots, part = mask_ref.shape[1], pl.program_id(0)
    layer, length = layer_ref[0], length_ref[0]
    head, split = part // splits, part % splits
    row, kv_head = head // kv_heads, head % kv_heads
    tiles = RowTiles(refs[:6], layer, head, interpret)
    queries = [
        [scale * read(q_ref.at[row, kv_head * group + g, x], tiles.inside) for x in tiles.columns]
        for g in range(group)
    ]

    def add_tile(i, carry):
        first = (split + i * splits) * tiling.slots
        rows = jnp.arange(tiling.rows, dtype=jnp.int32)
        each = [first + p * tiling.rows + rows for p in range(tiling.passes)]
        seen = [plt.load(mask_ref.at[row, x], mask=x < slots, other=False) for x in each]
        tiles.load(first, each, [x < jnp.minimum(slots, length) for x in each])
        out = []
        for query, (sums, top, total) in zip(queries, carry):
            logits = [jnp.where(s, x, LOWEST) for s, x in zip(seen, tiles.dot(query))]
            new_top = functools.reduce(jnp.maximum, logits, top)
            factor = jnp.exp(top - new_top)
            # There may be no slot that is seen: its exponentials are not 1 but nothing.
            weights = [jnp.where(s, jnp.exp(x - new_top), 0.0) for s, x in zip(seen, logits)]
            sums = tiles.add(sums, factor, weights)
            out.append((sums, new_top, sum(weights, total * factor)))
        return out

    count = pl.cdiv(length, tiling.slots)
    mine = pl.cdiv(jnp.maximum(count - split, 0), splits)
    start = [tiles.start(tiling.rows)] * group
    for g, found in enumerate(jax.lax.fori_loop(0, mine, add_tile, start)):
        sums, tops_ref[part, g], totals_ref[part, g] = tiles.finish(*found)
        for x, column in zip(sums, tiles.columns):
            plt.store(sums_ref.at[part, g, column], x, mask=tiles.inside)


class RowTiles:
    """Keys and values as words of codes: `refs` are those of `PackedTiles`."""

    def __init__(self, refs, layer, head, interpret: bool):
        self.refs, self.place, self.interpret = refs, (layer, head), interpret
        blocks, size = refs[3].shape[-2:]
        self.tile = pl.next_power_of_2(blocks), pl.next_power_of_2(size)
        self.block, self.word = (jax.lax.broadcasted_iota(jnp.int32, self.tile, i) for i in (0, 1))
        self.inside = (self.block < blocks) & (self.word < size)
        self.words = self.block * size + self.word
        self.columns = word_columns(self.words, refs[1].shape[-1] // (blocks * size))
        self.group = refs[0].shape[2] // refs[1].shape[2]  # slots

    def start(self, rows: int):
        """Return the sums of values by columns and of their offsets, of a maximum and weights."""
        sums = jnp.zeros((rows, *self.tile), jnp.float32)
        sums = [sums for _ in self.columns] + [jnp.zeros((rows, self.tile[0]), jnp.float32)]
        return sums, jnp.full((rows,), LOWEST, jnp.float32), jnp.zeros((rows,), jnp.float32)

    def load(self, first, slots, used) -> None:
        """Load slots [rows] of each pass from the first one on, those in use, all of one group."""
        codes, step, low, *refs = self.refs
        group, block = first // self.group, jnp.arange(self.tile[0], dtype=jnp.int32)
        place = [(*self.place, group, column) for column in self.columns]
        scales = [[read(ref.at[p], self.inside) for ref in (step, low)] for p in place]
        self.step, self.low = zip(*(self._rescale(*pair) for pair in scales))
        self.keys, self.values, self.scales = [], [], []
        for slot, inside in zip(slots, used):
            mask = inside[:, None, None] & self.inside[None]
            place = *self.place, slot[:, None, None], self.words[None]
            self.keys.append(plt.load(codes.at[place], mask=mask, other=0))
            place = *self.place, slot[:, None, None], self.block[None], self.word[None]
            self.values.append(plt.load(refs[0].at[place], mask=mask, other=0))
            mask = inside[:, None] & (block < refs[0].shape[-2])[None]
            place = *self.place, slot[:, None], block[None]
            self.scales.append(self._rescale(*(read(ref.at[place], mask) for ref in refs[1:])))

    def dot(self, query) -> list[jax.Array]:
        """Return the products of a query's columns with the keys, [rows] of each pass."""
        offset = functools.reduce(jnp.add, [x * low for x, low in zip(query, self.low)])
        scaled = [x * step for x, step in zip(query, self.step)]
        out = []
        for codes in self.keys:
            product = offset[None]
            for code, x in zip(self._floats(codes), scaled):
                product = fma(code, x[None], product, self.interpret)
            out.append(jnp.sum(jnp.sum(product, axis=2), axis=1))
        return out

    def add(self, sums, factor, weights) -> list[jax.Array]:
        """Return factor [rows] * sums + the values, each times its weight."""
        *sums, lows = (x * factor.reshape(-1, *[1] * (x.ndim - 1)) for x in sums)
        for weight, codes, (step, low) in zip(weights, self.values, self.scales):
            lows += weight[:, None] * low
            each = (weight[:, None] * step)[:, :, None]
            sums = [fma(c, each, x, self.interpret) for c, x in zip(self._floats(codes), sums)]
        return [*sums, lows]

    def finish(self, sums, top, total):
        """Return the sum of each array of columns, and two scalars."""
        best = jnp.max(top)
        factor = jnp.exp(top - best)
        *sums, lows = (jnp.sum(x * factor.reshape(-1, *[1] * (x.ndim - 1)), axis=0) for x in sums)
        return [x + lows[:, None] for x in sums], best, jnp.sum(total * factor)

    def _floats(self, codes) -> list[jax.Array]:
        """Return the codes of each array of columns: in 4 bits as 1 + code / 16."""
        if len(self.columns) == 2:
            return [byte_to_float(codes, i, self.interpret) for i in (0, 1)]
        places = (4, 0, 12, 8)  # of the lowest bit
        return [nibble_to_float(codes, place, self.interpret) for place in places]

    def _rescale(self, step, low):
        """Return the step and the low of what `_floats` says."""
        return (step, low) if len(self.columns) == 2 else (16 * step, low - 16 * step)


def fma(a, b, c, interpret: bool) -> jax.Array:
    """Return a * b + c of float32, rounded once: the compiler, left alone, multiplies and adds."""
    shape = jnp.broadcast_shapes(a.shape, b.shape, c.shape)
    a, b, c = (jnp.broadcast_to(x, shape) for x in (a, b, c))
    if interpret:
        return a * b + c
    return _asm("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", 1, a, b, c)


def byte_to_float(x, i: int, interpret: bool) -> jax.Array:
    """Return byte i of uint16 as float32: behind the bits of 2**23 it adds its value to it."""
    if interpret:
        return ((x >> (8 * i)) & 255).astype(jnp.float32)
    lines = [
        f"prmt.b32 x, $2, 0x4B000000, 0x744{i + 2 * j}; mov.b32 f, x; "
        f"add.rn.f32 ${j}, f, {-(2.0**23)};"
        for j in (0, 1)
    ]
    return _asm(f"{{ .reg .b32 x; .reg .f32 f; {' '.join(lines)} }}", "=f,=f,r", 2, x)


def nibble_to_float(x, place: int, interpret: bool) -> jax.Array:
    """Return 1 + a nibble of uint16 / 16 in float32: the nibble begins the mantissa."""
    if interpret:
        return 1 + ((x >> place) & 15).astype(jnp.float32) / 16
    shift = "shr.b32 x, $2, 1;" if place % 8 else "shl.b32 x, $2, 3;"
    mark = "and.b32 x, x, 0x78787878; or.b32 x, x, 0x80808080;"  # one instruction
    lines = [
        f"prmt.b32 y, x, 0x3F000000, 0x7{place // 8 + 2 * j}44; mov.b32 ${j}, y;" for j in (0, 1)
    ]
    return _asm(f"{{ .reg .b32 x, y; {shift} {mark} {' '.join(lines)} }}", "=f,=f,r", 2, x)


def _asm(text: str, constraints: str, pack: int, *args) -> jax.Array:
    result = jax.ShapeDtypeStruct(args[0].shape, jnp.float32)
    [out] = plt.elementwise_inline_asm(
        text, args=args, constraints=constraints, pack=pack, result_shape_dtypes=[result]
    )
    return out
