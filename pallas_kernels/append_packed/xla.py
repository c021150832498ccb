"""append_packed in plain jnp."""

import jax
import jax.numpy as jnp

from pallas_kernels.packed import Packed, place, take_layer


def append_packed(k, v, keys, recent, values, slot, *, layer=None):
    """See `pallas_kernels.append_packed`."""
    size = recent.shape[-2]
    group, offset = slot // size, slot % size
    recent = place(recent, layer, k[:, :, None], offset)
    # What is not written yet gets the last key, which widens no channel's range.
    is_written = jnp.arange(size)[:, None] <= offset
    whole = jnp.where(is_written, take_layer(recent, layer), k[:, :, None].astype(recent.dtype))
    found = Packed.encode(whole[:, :, None], -2, keys.bits)
    keys = jax.tree.map(lambda held, x: place(held, layer, x, group), keys, found)
    blocks = values.step.shape[-2]
    found = Packed.encode(v.reshape(*v.shape[:2], 1, blocks, -1), -1, values.bits)
    values = jax.tree.map(lambda held, x: place(held, layer, x, slot), values, found)
    return keys, recent, values


def unsupported(*args, **options) -> None:
    """It runs everywhere."""
