"""The key-value cache: a plain pytree of static size, written slot by slot.

Slots are columns of the batch: token `t` of every row sits in slot `t`, padding included, and
`valid` says which slots hold a real token. Positions (for RoPE) are kept apart from slots, so that
padded rows of different lengths share one write index.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import append_attention, append_packed, decode_attention
from pallas_kernels.packed import place, take_layer
from qjax.models.packed_cache import BITS, PackedKeys, PackedValues, check_kv_format
from qjax.models.step_linear import has_kernel


class KVCache(NamedTuple):
    """Keys and values of the tokens so far.

    Attributes:
        k, v: per layer [B, kv_heads, slots, head_dim] in a tuple; or all layers stacked in one
            array [layers, B, kv_heads, slots, head_dim] for a model that scans over its layers.
            What a head reads lies together. In 8 or 4 bits `PackedKeys` and `PackedValues` stand
            for the arrays.
        valid: bool [B, slots].
        length: int32 scalar, the slots written so far; a NumPy scalar while nothing is written, so
            that this is known when a call is traced.
    """

    k: Any
    v: Any
    valid: jax.Array
    length: Any

    @property
    def slots(self) -> int:
        """Tokens a row can hold."""
        return self.valid.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def is_packed(self) -> bool:
        """Whether it is in 8 or 4 bits."""
        held = self.k[0] if isinstance(self.k, tuple) else self.k
        return isinstance(held, PackedKeys)

    @property
    def is_fresh(self) -> bool:
        """Whether it is known to be empty."""
        return isinstance(self.length, np.generic) and self.length == 0


def init_cache(
    layers: int,
    batch: int,
    slots: int,
    kv_heads: int,
    head_dim: int,
    dtype,
    stacked: bool,
    kv_format: str | None = None,
) -> KVCache:
    """Return an empty cache.

    Args:
        stacked: one array for all layers in place of a tuple of arrays.
        kv_format: "int8" or "int4" (`qjax.models.packed_cache`); None is `dtype`.
    """
    check_kv_format(kv_format, head_dim)
    shape = (batch, kv_heads, slots, head_dim)
    if kv_format is None:
        makers = [lambda shape: jnp.zeros(shape, dtype)] * 2
    else:
        bits = BITS[kv_format]
        makers = [
            lambda shape: PackedKeys.zeros(shape, dtype, bits),
            lambda shape: PackedValues.zeros(shape, bits),
        ]
    k, v = (
        make((layers, *shape)) if stacked else tuple(make(shape) for _ in range(layers))
        for make in makers
    )
    return KVCache(k, v, jnp.zeros((batch, slots), jnp.bool_), np.int32(0))


def write(cache: KVCache, layer, k: jax.Array, v: jax.Array) -> KVCache:
    """Write k and v [B, T, kv_heads, head_dim] of T tokens at the cache's length.

    `layer` is an int for a tuple cache, and may be traced for a stacked one. `valid` and `length`
    are the caller's: they move once a step, not once a layer.
    """
    if cache.is_packed and k.shape[1] == 1:
        return _append_packed(cache, layer, k[:, 0], v[:, 0])
    k, v = (
        _write(held, layer, new.swapaxes(1, 2), cache.length)
        for held, new in ((cache.k, k), (cache.v, v))
    )
    return cache._replace(k=k, v=v)


def read(cache: KVCache, layer) -> tuple[jax.Array, jax.Array]:
    """Return a layer's k and v, all slots: [B, slots, kv_heads, head_dim]."""
    # Packed keys are in groups, of which the last may end behind the slots.
    k, v = (_read(held, layer)[:, :, : cache.slots] for held in (cache.k, cache.v))
    return k.swapaxes(1, 2), v.swapaxes(1, 2)


def attend_one(q: jax.Array, cache: KVCache, layer, mask: jax.Array, scale) -> jax.Array:
    """Attend to a layer of a cache with the one query a row that was written last.

    Args:
        q: [B, 1, heads, head_dim].
        mask: bool [B or 1, 1, 1, slots].
        scale: as in `attend`.

    Returns:
        Of q's shape and dtype.
    """
    mask = jnp.broadcast_to(mask[:, 0, 0], cache.valid.shape)
    k: Any = cache.k
    v: Any = cache.v
    index, written = layer, jnp.asarray(cache.length) + 1
    if isinstance(k, tuple):
        k, v, index = k[layer], v[layer], None
    if isinstance(k, PackedKeys):
        k, v = k.packed, v.packed
    return decode_attention(q[:, 0], k, v, mask, written, scale=scale, layer=index)[:, None]


def append_one(
    qkv: jax.Array,
    cache: KVCache,
    layer,
    mask: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    scale,
    low_rank: tuple[jax.Array, float] | None = None,
) -> tuple[jax.Array, jax.Array | None, KVCache]:
    """Rotate one query and key a row, `write` into a float cache, and `attend_one`, in one.

    Args:
        qkv: [B, heads + 2 kv_heads, head_dim], in this order.
        mask: as in `attend_one`, with the new token.
        rope: cosines and sines [B, 1, 1, head_dim / 2].
        scale: as in `attend`.
        low_rank: A and the factor of the next layer's adapter, as `append_attention` takes them.

    Returns:
        [B, 1, heads, head_dim] in qkv's dtype; its product with A, or None without `low_rank` and
        where the kernel takes none; and the cache, see `write` for what is the caller's.
    """
    mask = jnp.broadcast_to(mask[:, 0, 0], cache.valid.shape)
    cos, sin = (jnp.broadcast_to(a[:, 0, 0], (len(qkv), a.shape[-1])) for a in rope)
    k: Any = cache.k
    v: Any = cache.v
    is_list, written = isinstance(k, tuple), jnp.asarray(cache.length) + 1
    held, index = ((k[layer], v[layer]), None) if is_list else ((k, v), layer)
    new = qkv, *held, mask, written, cos, sin
    a, factor = low_rank or (None, 1.0)
    how: dict[str, Any] = {"factor": factor, "scale": scale, "layer": index}
    if a is not None and not has_kernel("append_attention", *new, a, **how):
        a = None
    out, hidden, *held = append_attention(*new, a, **how)
    if is_list:
        held = [(*whole[:layer], one, *whole[layer + 1 :]) for whole, one in zip((k, v), held)]
    return out[:, None], hidden, cache._replace(k=held[0], v=held[1])


def _append_packed(cache: KVCache, layer, k: jax.Array, v: jax.Array) -> KVCache:
    """Write k and v [B, kv_heads, head_dim]."""
    keys, values, index = cache.k, cache.v, layer
    if is_list := isinstance(keys, tuple):
        keys, values, index = keys[layer], values[layer], None
    held = keys.packed, keys.recent, values.packed
    codes, recent, more = append_packed(k, v, *held, cache.length, layer=index)
    keys, values = PackedKeys(codes, recent), PackedValues(more)
    if is_list:
        keys, values = (
            (*whole[:layer], one, *whole[layer + 1 :])
            for whole, one in ((cache.k, keys), (cache.v, values))
        )
    return cache._replace(k=keys, v=values)


def _write(held, layer, new: jax.Array, start):
    if isinstance(held, tuple):
        return (*held[:layer], _write(held[layer], None, new, start), *held[layer + 1 :])
    if isinstance(held, PackedKeys | PackedValues):
        return held.write(layer, new, start)
    return place(held, layer, new, start)


def _read(held, layer) -> jax.Array:
    if isinstance(held, tuple):
        return _read(held[layer], None)
    if isinstance(held, PackedKeys | PackedValues):
        return held.read(layer)
    return take_layer(held, layer)
