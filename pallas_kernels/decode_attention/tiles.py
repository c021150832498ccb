"""What a program of `triton` reads and sums up, for each kind of cache.

The channels of a head lie in one or two arrays of columns, of any rank: queries are read,
multiplied and stored by these. A tile is some rows of slots, and as many in each further pass.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.packed import Packed


class Tiling(NamedTuple):
    """How a program walks along the slots.

    Attributes:
        warps: of a program.
        rows: slots side by side.
        passes: rows after one another of a tile, whose loads all come first.
        programs: so many fill an H100.
    """

    warps: int
    rows: int
    passes: int
    programs: int

    @property
    def slots(self) -> int:
        """Of a tile."""
        return self.rows * self.passes


def cache_operands(k, v, heads: int) -> list[jax.Array]:
    """Return what `FloatTiles` or `PackedTiles` takes as refs; `heads` are those of all rows."""
    if not isinstance(k, Packed):
        return [x.reshape(-1, heads, *x.shape[-2:]) for x in (k, v)]
    slots, blocks, size = v.codes.shape[-3:]
    keys = [words(k.codes), k.step, k.low]
    values = [words(v.codes), v.step, v.low]
    shapes = [(-1, x.shape[-1]) for x in keys]
    shapes += [(slots, blocks, size // 2), (slots, blocks), (slots, blocks)]
    layers = math.prod(v.codes.shape[:-5])
    return [x.reshape(layers, heads, *shape) for x, shape in zip(keys + values, shapes)]


def words(codes: jax.Array) -> jax.Array:
    """View uint8 [..., 2 n] as uint16 [..., n]: XLA copies nothing.

    Offsets of uint8 would be wrong where an array has 2**31 elements and no more than 2**32.
    """
    return jax.lax.bitcast_convert_type(codes.reshape(*codes.shape[:-1], -1, 2), jnp.uint16)


def whole_words(values: Packed) -> str | None:
    """Why blocks of values are not words, or None."""
    if values.codes.shape[-1] % 2:
        return f"blocks are {values.codes.shape[-1]} bytes; the kernel reads two at a time"
    return None


class FloatTiles:
    """Keys and values as they are, summed up over all rows of a tile.

    Args:
        refs: k and v, [layers, heads, slots, head_dim] each.
        new: the key and the value of the slot `last`, or none.
    """

    def __init__(self, refs, layer, head, new=(), last=None):
        self.refs, self.place, self.new, self.last = refs, (layer, head), new, last
        width = refs[0].shape[-1]
        column = jnp.arange(pl.next_power_of_2(width), dtype=jnp.int32)
        self.columns, self.inside = [column], column < width

    def start(self, rows: int):
        """Return the sums of the values, a scalar to begin the maximum and one of the weights."""
        del rows
        return [jnp.zeros(self.inside.shape, jnp.float32)], jnp.float32(0)

    def load(self, first, slots, used) -> "FloatTiles":
        """Load slots [rows] of each pass from the first one on, those that are in use."""
        del first
        tiles = []
        for slot, inside in zip(slots, used):
            mask = inside[:, None] & self.inside[None]
            place = *self.place, slot[:, None], self.columns[0][None]
            pair = [read(ref.at[place], mask) for ref in self.refs]
            if self.new:
                is_new = (slot == self.last)[:, None]
                new = (x.astype(jnp.float32)[None] for x in self.new)
                pair = [jnp.where(is_new, x, held) for x, held in zip(new, pair)]
            tiles.append(pair)
        self.keys, self.values = zip(*tiles)
        return self

    def dot(self, query) -> list[jax.Array]:
        """Return the products of a query's columns with the keys, [rows] of each pass."""
        return [jnp.sum(keys * query[0][None], axis=1) for keys in self.keys]

    def fold(self, over, x) -> jax.Array:
        """Return what a tile adds to a running maximum or sum, from [rows]."""
        return over(x)

    def add(self, sums, factor, weights) -> list[jax.Array]:
        """Return factor * sums + the values, each times its weight."""
        added = sums[0] * factor
        for weight, values in zip(weights, self.values):
            added += jnp.sum(values * weight[:, None], axis=0)
        return [added]

    def finish(self, sums, top, total):
        """Return the sum of each array of columns, and two scalars."""
        return sums, top, total


class PackedTiles:
    """Keys and values in 8 or 4 bits, in which no code is decoded by itself.

    A key's step goes into the query. Values are summed up as codes, each times its step and its
    weight, and the offsets apart from them. Each row of a tile has a running maximum and sums of
    its own: threads exchange nothing but the logits before the end.

    Args:
        refs: of the keys words of codes [layers, heads, slots up to a whole group, words], step
            and low [layers, heads, groups, head_dim]; of the values words [layers, heads, slots,
            blocks, words of a block], step and low [layers, heads, slots, blocks].
    """

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
        """See `FloatTiles`; the last sums are of the offsets."""
        sums = jnp.zeros((rows, *self.tile), jnp.float32)
        sums = [sums for _ in self.columns] + [jnp.zeros((rows, self.tile[0]), jnp.float32)]
        return sums, jnp.zeros((rows,), jnp.float32)

    def load(self, first, slots, used) -> "PackedTiles":
        """See `FloatTiles`; the slots are of one group."""
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
        return self

    def dot(self, query) -> list[jax.Array]:
        """See `FloatTiles`."""
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
        """See `FloatTiles`; factor is [rows]."""
        *sums, lows = (x * factor.reshape(-1, *[1] * (x.ndim - 1)) for x in sums)
        for weight, codes, (step, low) in zip(weights, self.values, self.scales):
            lows += weight[:, None] * low
            each = (weight[:, None] * step)[:, :, None]
            sums = [fma(c, each, x, self.interpret) for c, x in zip(self._floats(codes), sums)]
        return [*sums, lows]

    def fold(self, over, x) -> jax.Array:
        """See `FloatTiles`."""
        del over
        return x

    def finish(self, sums, top, total):
        """See `FloatTiles`."""
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


def word_columns(word: jax.Array, count: int) -> list[jax.Array]:
    """Return the columns of the codes in words: two bytes, the first the lower, or four nibbles."""
    return [count * word + i for i in range(count)]


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


def read(ref, mask) -> jax.Array:
    """Load float32, zero outside the mask."""
    return plt.load(ref, mask=mask, other=0.0).astype(jnp.float32)
