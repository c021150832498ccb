"""Arrays in 8 or 4 bits with a step and an offset, as a cache holds keys and values."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.packing import pack, unpack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Codes from 0 to 2**bits - 1, worth `code * step + low`.

    Attributes:
        codes: uint8, two a byte along the last axis in 4 bits.
        step, low: float16, of the codes along one axis each.
        bits: 8 or 4.
    """

    codes: jax.Array
    step: jax.Array
    low: jax.Array
    bits: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def zeros(cls, shape: tuple[int, ...], axis: int, bits: int) -> "Packed":
        """Return what stands for zeros of this shape."""
        like = jax.eval_shape(lambda: cls.encode(jnp.zeros(shape), axis, bits))
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)

    @classmethod
    def encode(cls, x: jax.Array, axis: int, bits: int) -> "Packed":
        """Encode float x, with a step and a low for all along an axis."""
        x = x.astype(jnp.float32)
        ends = jnp.min(x, axis, keepdims=True), jnp.max(x, axis, keepdims=True)
        # XLA on a GPU would leave out their rounding, and codes would not fit what is stored.
        step, low = jax.lax.optimization_barrier(fit(*ends, bits))
        codes = jnp.round(scaled(x, step, low, bits)).astype(jnp.uint8)
        return cls(codes if bits == 8 else pack(codes), step, low, bits)

    def decode(self) -> jax.Array:
        """Return float32."""
        codes = self.codes if self.bits == 8 else unpack(self.codes)
        step, low = self.step.astype(jnp.float32), self.low.astype(jnp.float32)
        return codes.astype(jnp.float32) * step + low


def fit(lowest: jax.Array, highest: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Return the step and the low, float16, for float32 numbers between these."""
    low = lowest.astype(jnp.float16)
    step = (highest - low.astype(jnp.float32)) / (2.0**bits - 1)
    return step.astype(jnp.float16), low


def scaled(x: jax.Array, step: jax.Array, low: jax.Array, bits: int) -> jax.Array:
    """Return the codes of float32 numbers before they are rounded."""
    each = step.astype(jnp.float32)  # codes fit the step as it is stored
    codes = jnp.where(each > 0, (x - low.astype(jnp.float32)) / each, 0.0)
    return jnp.clip(codes, 0.0, 2.0**bits - 1)


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


def count_heads(held: jax.Array | Packed) -> int:
    """Return the heads of a cache's keys or values, as `decode_attention` takes them."""
    return held.codes.shape[-4] if isinstance(held, Packed) else held.shape[-3]
