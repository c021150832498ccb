"""Keys and values in 8 or 4 bits, as they lie in a cache.

The scheme is KIVI's (arXiv:2402.02750), because keys have channels that are far from zero in every
token: a group of 64 tokens shares a step and an offset in each channel of a key, and a value has
its own for each 64 channels. Both are float16: 8.5 and 4.5 bits a number. The last group of keys
is held beside them as it was, and encoded again with each key that is added to it.

Nothing decoded is stored: decoding is elementwise, and XLA fuses it with the attention that reads.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.packing import pack, unpack

BITS = {"int8": 8, "int4": 4}
GROUP = 64  # tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Codes from 0 to 2**bits - 1, worth `code * step + low`.

    Attributes:
        codes: uint8, two a byte along the last axis in 4 bits.
        step, low: float16, of the codes along one axis each.
    """

    codes: jax.Array
    step: jax.Array
    low: jax.Array

    @classmethod
    def zeros(cls, shape: tuple[int, ...], axis: int, bits: int) -> "Packed":
        """Return what stands for zeros of this shape."""
        like = jax.eval_shape(lambda: cls.encode(jnp.zeros(shape), axis, bits))
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)

    @classmethod
    def encode(cls, x: jax.Array, axis: int, bits: int) -> "Packed":
        """Encode float x, with a step and a low for all along an axis."""
        x = x.astype(jnp.float32)
        levels = float(2**bits - 1)
        low = jnp.min(x, axis, keepdims=True).astype(jnp.float16)
        offset = x - low.astype(jnp.float32)
        step = (jnp.max(offset, axis, keepdims=True) / levels).astype(jnp.float16)
        each = step.astype(jnp.float32)  # codes fit the step as it is stored
        scaled = jnp.where(each > 0, offset / each, 0.0)
        codes = jnp.clip(jnp.round(scaled), 0.0, levels).astype(jnp.uint8)
        return cls(codes if bits == 8 else pack(codes), step, low)

    def decode(self, bits: int) -> jax.Array:
        """Return float32."""
        codes = self.codes if bits == 8 else unpack(self.codes)
        step, low = self.step.astype(jnp.float32), self.low.astype(jnp.float32)
        return codes.astype(jnp.float32) * step + low


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedKeys:
    """Keys in groups of tokens.

    Attributes:
        packed: [B, heads, groups, 64, head_dim], each channel of a group with a step of its own.
        recent: [B, heads, 64, head_dim] in the dtype of the computation, the last group.
        bits: 8 or 4.
    """

    packed: Packed
    recent: jax.Array
    bits: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype, bits: int) -> "PackedKeys":
        """Return keys for [*layers, B, heads, slots, head_dim]."""
        *leading, slots, width = shape
        groups = (*leading, -(-slots // GROUP), GROUP, width)
        return cls(Packed.zeros(groups, -2, bits), jnp.zeros((*leading, GROUP, width), dtype), bits)

    def write(self, layer, new: jax.Array, start) -> "PackedKeys":
        """Write keys [B, heads, T, head_dim] at slot `start`.

        The groups that they touch are encoded again: the first begins with keys of earlier calls.
        """
        tokens = new.shape[2]
        fresh = not isinstance(start, jax.Array) and start == 0
        inside = fresh or tokens == 1
        touched = -(-(tokens if inside else tokens + GROUP - 1) // GROUP)
        first, offset = start // GROUP, start % GROUP
        recent = take_layer(self.recent, layer)
        new = new.astype(recent.dtype)
        # What is not written yet gets the last key, which widens no channel's range.
        buffer = jnp.repeat(new[:, :, -1:], touched * GROUP, axis=2)
        index = jnp.arange(touched * GROUP)[:, None]
        earlier = jnp.tile(recent, (1, 1, touched, 1))
        buffer = jnp.where(index < offset, earlier, buffer)
        buffer = jax.lax.dynamic_update_slice_in_dim(buffer, new, offset, axis=2)
        groups = buffer.reshape(*new.shape[:2], touched, GROUP, -1)
        last = (offset + tokens - 1) // GROUP
        recent = jax.lax.dynamic_index_in_dim(groups, last, axis=2, keepdims=False)
        found = Packed.encode(groups, -2, self.bits)
        # The last of several groups may be empty, and have no place.
        put = functools.partial(place, may_end_behind=not inside)
        packed = jax.tree.map(lambda held, x: put(held, layer, x, first), self.packed, found)
        return PackedKeys(packed, place(self.recent, layer, recent, 0), self.bits)

    def read(self, layer) -> jax.Array:
        """Return a layer's [B, heads, slots, head_dim] in float32, slots up to a whole group."""
        whole = jax.tree.map(lambda held: take_layer(held, layer), self.packed).decode(self.bits)
        return whole.reshape(*whole.shape[:2], -1, whole.shape[-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedValues:
    """Values token by token.

    Attributes:
        packed: [B, heads, slots, blocks, channels of a block].
        bits: 8 or 4.
    """

    packed: Packed
    bits: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def zeros(cls, shape: tuple[int, ...], bits: int) -> "PackedValues":
        """Return values for [*layers, B, heads, slots, head_dim]."""
        *leading, width = shape
        block = math.gcd(width, 64) if width % 32 == 0 else width
        return cls(Packed.zeros((*leading, width // block, block), -1, bits), bits)

    def write(self, layer, new: jax.Array, start) -> "PackedValues":
        """Write values [B, heads, T, head_dim] at slot `start`."""
        blocks = self.packed.step.shape[-2]
        found = Packed.encode(new.reshape(*new.shape[:3], blocks, -1), -1, self.bits)
        packed = jax.tree.map(lambda held, x: place(held, layer, x, start), self.packed, found)
        return PackedValues(packed, self.bits)

    def read(self, layer) -> jax.Array:
        """Return a layer's [B, heads, slots, head_dim] in float32."""
        whole = jax.tree.map(lambda held: take_layer(held, layer), self.packed).decode(self.bits)
        return whole.reshape(*whole.shape[:3], -1)


def check_kv_format(kv_format: str | None, head_dim: int) -> None:
    """Raise ValueError unless keys and values can be held so."""
    if kv_format is not None and kv_format not in BITS:
        raise ValueError(f"kv_format={kv_format!r} must be None or one of {list(BITS)}")
    if kv_format == "int4" and head_dim % 2:
        raise ValueError(f"kv_format='int4' packs two numbers a byte, head_dim={head_dim} is odd")


def place(held: jax.Array, layer, new: jax.Array, index, *, may_end_behind: bool = False):
    """Return an array with [B, heads, n, ...] written at `index` of its third axis.

    Only that is written, so that a donated or loop-carried array changes in place.

    Args:
        layer: None, or which of the layers that the array stacks; may be traced.
        may_end_behind: what would lie behind the end is left out, where it would move to the front.
    """
    if may_end_behind:
        whole = held[None] if layer is None else held
        at = jnp.asarray(0 if layer is None else layer), slice(None), slice(None)
        rows = index + jnp.arange(new.shape[2])
        # An index between slices moves to the front: so does the axis of the groups.
        values = jnp.moveaxis(new.astype(held.dtype), 2, 0)
        whole = whole.at[(*at, rows)].set(values, mode="drop")
        return whole[0] if layer is None else whole
    zeros = [0] * new.ndim
    zeros[2] = index
    if layer is not None:
        zeros, new = [layer, *zeros], new[None]
    starts = [jnp.asarray(i, jnp.int32) for i in zeros]
    return jax.lax.dynamic_update_slice(held, new.astype(held.dtype), starts)


def take_layer(held: jax.Array, layer) -> jax.Array:
    """Return the array, or the layer of those that it stacks."""
    if layer is None:
        return held
    return jax.lax.dynamic_index_in_dim(held, layer, axis=0, keepdims=False)
