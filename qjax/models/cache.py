"""The key-value cache: a plain pytree of static size, written slot by slot.

Slots are columns of the batch: token `t` of every row sits in slot `t`, padding included, and
`valid` says which slots hold a real token. Positions (for RoPE) are kept apart from slots, so that
padded rows of different lengths share one write index.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import decode_attention


class KVCache(NamedTuple):
    """Keys and values of the tokens so far.

    Attributes:
        k, v: per layer [B, kv_heads, slots, head_dim] in a tuple; or all layers stacked in one
            array [layers, B, kv_heads, slots, head_dim] for a model that scans over its layers.
            What a head reads lies together.
        valid: bool [B, slots].
        length: int32 scalar, the slots written so far; a NumPy scalar while nothing is written, so
            that this is known when a call is traced.
    """

    k: tuple[jax.Array, ...] | jax.Array
    v: tuple[jax.Array, ...] | jax.Array
    valid: jax.Array
    length: jax.Array | np.generic

    @property
    def slots(self) -> int:
        """Tokens a row can hold."""
        return self.valid.shape[1]

    @property
    def is_fresh(self) -> bool:
        """Whether it is known to be empty."""
        return isinstance(self.length, np.generic) and self.length == 0


def init_cache(
    layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype, stacked: bool
) -> KVCache:
    """Return an empty cache. `stacked` chooses one array for all layers over a tuple of arrays."""
    shape = (batch, kv_heads, slots, head_dim)

    def zeros():
        if stacked:
            return jnp.zeros((layers, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(layers))

    return KVCache(zeros(), zeros(), jnp.zeros((batch, slots), jnp.bool_), np.int32(0))


def write(cache: KVCache, layer, k: jax.Array, v: jax.Array) -> KVCache:
    """Write k and v [B, T, kv_heads, head_dim] of T tokens at the cache's length.

    `layer` is an int for a tuple cache, and may be traced for a stacked one. `valid` and `length`
    are the caller's: they move once a step, not once a layer.
    """
    k, v = (_write(store, layer, new, cache.length) for store, new in ((cache.k, k), (cache.v, v)))
    return cache._replace(k=k, v=v)


def read(cache: KVCache, layer) -> tuple[jax.Array, jax.Array]:
    """Return a layer's k and v, all slots: [B, slots, kv_heads, head_dim]."""
    if not isinstance(cache.k, tuple):
        take = functools.partial(jax.lax.dynamic_index_in_dim, axis=0, keepdims=False)
        return take(cache.k, layer).swapaxes(1, 2), take(cache.v, layer).swapaxes(1, 2)
    return cache.k[layer].swapaxes(1, 2), cache.v[layer].swapaxes(1, 2)


def attend_one(q: jax.Array, cache: KVCache, layer, mask: jax.Array, scale) -> jax.Array:
    """Attend to a layer with the one query a row that was written last.

    Args:
        q: [B, 1, heads, head_dim].
        mask: bool [B or 1, 1, 1, slots].
        scale: as in `attend`.

    Returns:
        Of q's shape and dtype.
    """
    mask = jnp.broadcast_to(mask[:, 0, 0], cache.valid.shape)
    k, v, index = cache.k, cache.v, layer
    if isinstance(k, tuple):
        k, v, index = k[layer], v[layer], None
    length = cache.length + 1
    return decode_attention(q[:, 0], k, v, mask, length, scale=scale, layer=index)[:, None]


def _write(store, layer, new: jax.Array, start):
    new, zero = new.swapaxes(1, 2), np.int32(0)
    if isinstance(store, tuple):
        new = new.astype(store[layer].dtype)
        whole = jax.lax.dynamic_update_slice(store[layer], new, (zero, zero, start, zero))
        return (*store[:layer], whole, *store[layer + 1 :])
    # Only the new slots are written, so that a donated or loop-carried cache changes in place.
    at = (jnp.asarray(layer, jnp.int32), zero, zero, start, zero)
    return jax.lax.dynamic_update_slice(store, new.astype(store.dtype)[None], at)
