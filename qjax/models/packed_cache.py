"""Keys and values in 8 or 4 bits, as they lie in a cache.

The scheme is KIVI's (arXiv:2402.02750), because keys have channels that are far from zero in every
token: a group of 64 tokens shares a step and an offset in each channel of a key, and a value has
its own for each 64 channels. Both are float16: 8.5 and 4.5 bits a number. The last group of keys
is held beside them as it was, and encoded again with each key that is added to it.

Nothing decoded is stored: kernels of a GPU read the codes. Elsewhere decoding is elementwise, and
XLA fuses it with the attention that reads.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.packed import Packed, place, take_layer

BITS = {"int8": 8, "int4": 4}
GROUP = 64  # tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedKeys:
    """Keys in groups of tokens.

    Attributes:
        packed: [B, heads, groups, 64, head_dim], each channel of a group with a step of its own.
        recent: [B, heads, 64, head_dim] in the dtype of the computation, the last group.
    """

    packed: Packed
    recent: jax.Array

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype, bits: int) -> "PackedKeys":
        """Return keys for [*layers, B, heads, slots, head_dim]."""
        *leading, slots, width = shape
        groups = (*leading, -(-slots // GROUP), GROUP, width)
        return cls(Packed.zeros(groups, -2, bits), jnp.zeros((*leading, GROUP, width), dtype))

    def write(self, layer, new: jax.Array, start) -> "PackedKeys":
        """Write keys [B, heads, T, head_dim] at slot `start`.

        The groups that they touch are encoded again: the first begins with keys of earlier calls.
        """
        tokens = new.shape[2]
        inside = not isinstance(start, jax.Array) and start == 0
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
        found = Packed.encode(groups, -2, self.packed.bits)
        # The last of several groups may be empty, and have no place.
        put = functools.partial(place, may_end_behind=not inside)
        packed = jax.tree.map(lambda held, x: put(held, layer, x, first), self.packed, found)
        return PackedKeys(packed, place(self.recent, layer, recent, 0))

    def read(self, layer) -> jax.Array:
        """Return a layer's [B, heads, slots, head_dim] in float32, slots up to a whole group."""
        whole = jax.tree.map(lambda held: take_layer(held, layer), self.packed).decode()
        return whole.reshape(*whole.shape[:2], -1, whole.shape[-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedValues:
    """Values token by token.

    Attributes:
        packed: [B, heads, slots, blocks, channels of a block].
    """

    packed: Packed

    @classmethod
    def zeros(cls, shape: tuple[int, ...], bits: int) -> "PackedValues":
        """Return values for [*layers, B, heads, slots, head_dim]."""
        *leading, width = shape
        block = math.gcd(width, 64) if width % 32 == 0 else width
        return cls(Packed.zeros((*leading, width // block, block), -1, bits))

    def write(self, layer, new: jax.Array, start) -> "PackedValues":
        """Write values [B, heads, T, head_dim] at slot `start`."""
        blocks = self.packed.step.shape[-2]
        found = Packed.encode(new.reshape(*new.shape[:3], blocks, -1), -1, self.packed.bits)
        packed = jax.tree.map(lambda held, x: place(held, layer, x, start), self.packed, found)
        return PackedValues(packed)

    def read(self, layer) -> jax.Array:
        """Return a layer's [B, heads, slots, head_dim] in float32."""
        whole = jax.tree.map(lambda held: take_layer(held, layer), self.packed).decode()
        return whole.reshape(*whole.shape[:3], -1)


def check_kv_format(kv_format: str | None, head_dim: int) -> None:
    """Raise ValueError unless keys and values can be held so."""
    if kv_format is not None and kv_format not in BITS:
        raise ValueError(f"kv_format={kv_format!r} must be None or one of {list(BITS)}")
    if kv_format == "int4" and head_dim % 2:
        raise ValueError(f"kv_format='int4' packs two numbers a byte, head_dim={head_dim} is odd")
