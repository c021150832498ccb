"""How programs walk along a cache, and what `products` reads of each kind: tiles as floats.

The channels of a head lie in one or more arrays of columns; a tile has an array for each.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.packed import Packed

LOWEST = float(np.finfo(np.float32).min)  # of logits that are not seen
MIN_SIDE = 16  # of a product by tensor cores


class Tiling(NamedTuple):
    """How programs walk along the slots.

    Attributes:
        warps: of a program.
        rows: slots side by side.
        passes: rows after one another of a tile, whose loads all come first.
        stages: tiles in flight and in use.
        programs: so many fill an H100.
        splits: programs of a head, at most; a power of two.
    """

    warps: int
    rows: int
    passes: int
    stages: int
    programs: int
    splits: int

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
    """Keys and values as they are.

    Args:
        refs: k and v, [layers, heads, slots, head_dim] each.
        dtype: of queries and weights, when they are multiplied with a tile.
    """

    def __init__(self, refs, layer, head, dtype):
        self.refs, self.place, self.dtype = refs, (layer, head), dtype
        self.width = refs[0].shape[-1]
        self.key_columns = self.value_columns = [lanes(self.width)]

    def load_scales(self, first, slot, used) -> list[jax.Array]:
        """Return what to load a tile ahead: `load` takes it too.

        Args:
            first, slot: the first slot, and all [slots].
            used: those to read; others are not NaN.
        """
        del first, slot, used
        return []

    def load(self, slot, used, scales):
        """Return the keys and the values of each array of columns, [slots, columns]."""
        del scales
        [column] = self.key_columns
        mask = used[:, None] & (column < self.width)[None]
        place = *self.place, slot[:, None], column[None]
        loaded = (plt.load(ref.at[place], mask=mask, other=0) for ref in self.refs)
        return [[x.astype(self.dtype)] for x in loaded]


class PackedTiles:
    """Keys and values in 8 or 4 bits, decoded to float16 or float32.

    Args:
        refs: of the keys words of codes [layers, heads, slots up to a whole group, words], step
            and low [layers, heads, groups, head_dim]; of the values words [layers, heads, slots,
            blocks, words of a block], step and low [layers, heads, slots, blocks].
        dtype: see `FloatTiles`.
        interpret: the kernel runs as jnp, where assembly cannot.
    """

    def __init__(self, refs, layer, head, dtype, interpret: bool):
        self.refs, self.place, self.dtype, self.interpret = refs, (layer, head), dtype, interpret
        self.head_dim, (self.blocks, self.size) = refs[1].shape[-1], refs[3].shape[-2:]
        self.count = self.head_dim // (self.blocks * self.size)  # codes of a word
        self.group = refs[0].shape[2] // refs[1].shape[2]  # slots
        self.word, self.block_word = lanes(refs[0].shape[-1]), lanes(self.size)
        self.key_columns = word_columns(self.word, self.count)
        # Behind a block's last word is none of the next block.
        word = jnp.where(self.block_word < self.size, self.block_word, self.head_dim)
        starts = [block * self.size for block in range(self.blocks)]
        self.value_columns = [x for i in starts for x in word_columns(i + word, self.count)]

    def load_scales(self, first, slot, used) -> list[jax.Array]:
        """See `FloatTiles`: step and low of each array of columns, and of each block of values.

        The slots are of one group.
        """
        _, *keys, _, step, low = self.refs
        group = *self.place, first // self.group
        exists = group[-1] < keys[0].shape[2]
        found = [
            plt.load(x.at[*group, column], mask=exists & (column < self.head_dim), other=0)
            for column in self.key_columns
            for x in keys
        ]
        return found + [
            plt.load(x.at[*self.place, slot, block], mask=used, other=0)
            for block in range(self.blocks)
            for x in (step, low)
        ]

    def load(self, slot, used, scales):
        """See `FloatTiles`."""
        keys, values = self.refs[0], self.refs[3]
        mask = used[:, None] & (self.word < keys.shape[-1])[None]
        words = plt.load(keys.at[*self.place, slot[:, None], self.word[None]], mask=mask, other=0)
        mask = used[:, None] & (self.block_word < self.size)[None]
        place = *self.place, slot[:, None]
        blocks = [
            plt.load(values.at[*place, block, self.block_word[None]], mask=mask, other=0)
            for block in range(self.blocks)
        ]
        pairs = list(zip(scales[::2], scales[1::2]))
        keys = self._decode(words, [[x[None] for x in pair] for pair in pairs[: self.count]])
        values = [
            x
            for words, pair in zip(blocks, pairs[self.count :])
            for x in self._decode(words, [[x[:, None] for x in pair]] * self.count)
        ]
        return keys, values

    def _decode(self, words, scales) -> list[jax.Array]:
        """Return code * step + low of each column of words, whose scales are a list."""
        places = (0, 8) if self.count == 2 else (4, 0, 12, 8)  # of a code's lowest bit
        found = []
        for place, pair in zip(places, scales):
            pair = [jnp.broadcast_to(x, words.shape) for x in pair]
            if self.dtype == jnp.float16 and not self.interpret:
                found.append(_decode_halves([words, *pair], place, 16 // self.count))
                continue
            codes = (words >> place) & (2 ** (16 // self.count) - 1)
            step, low = (x.astype(jnp.float32) for x in pair)
            found.append((codes.astype(jnp.float32) * step + low).astype(self.dtype))
        return found


def lanes(size: int) -> jax.Array:
    """Return the columns of a product's operand: 0, 1, ..., with some behind the last."""
    return jnp.arange(max(MIN_SIDE, pl.next_power_of_2(size)), dtype=jnp.int32)


def word_columns(word: jax.Array, count: int) -> list[jax.Array]:
    """Return the columns of the codes in words: two bytes, the first the lower, or four nibbles."""
    return [count * word + i for i in range(count)]


def _decode_halves(args: list, place: int, bits: int) -> jax.Array:
    """Return code * step + low in float16 of words, step and low, two at a time.

    Behind the bits of 1024 a code adds its value to it.
    """
    mask = (2**bits - 1) * 0x10001
    lines = f"""{{ .reg .b32 x, offset; mov.b32 offset, 0xE400E400; shr.b32 x, $1, {place};
        and.b32 x, x, {mask}; or.b32 x, x, 0x64006400;
        add.rn.f16x2 x, x, offset; fma.rn.f16x2 $0, x, $2, $3; }}"""
    [out] = plt.elementwise_inline_asm(
        lines,
        args=args,
        constraints="=r,r,r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float16)],
    )
    return out


def read(ref, mask) -> jax.Array:
    """Load float32, zero outside the mask."""
    return plt.load(ref, mask=mask, other=0.0).astype(jnp.float32)
