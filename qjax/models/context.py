"""What a layer knows of the batch: which keys each query sees, and where tokens stand.

Slots are columns of the batch, or of the cache when there is one. A slot's order is its place among
the real tokens of its row: windows and ALiBi count real tokens, whatever the padding.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.concrete import is_concrete
from qjax.models.alibi import alibi
from qjax.models.cache import KVCache
from qjax.models.config import FULL, SLIDING, ModelConfig
from qjax.models.rope import rotation


class Context(NamedTuple):
    """The same for all layers of one kind.

    Attributes:
        mask: bool [B or 1, 1, T or 1, slots], True where a query sees a key; None: plain causal.
            With a cache, slots are all of its own; where it was empty, those of this call alone.
        bias: float32 [B or 1, heads, T or 1, slots], added to the attention logits; or None.
        rope: cosines and sines as `rope.rotation` returns them; or None.
    """

    mask: jax.Array | None = None
    bias: jax.Array | None = None
    rope: tuple[jax.Array, jax.Array] | None = None


def causal_contexts(
    config: ModelConfig,
    length: int,
    attention_mask: jax.Array | None,
    positions: jax.Array | None,
    cache: KVCache | None,
    relative: Callable[[jax.Array], jax.Array] | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[Mapping[str, Context], KVCache | None]:
    """Return a `Context` for each kind of layer, and the cache with `valid` moved.

    Args:
        length: T, the tokens of this call.
        attention_mask: bool [B, T], False on padding; None: no padding.
        positions: int32 [B, T], for RoPE.
        cache: None, or the cache whose next T slots these tokens take.
        relative: makes the bias of all layers from the distances int32 [B or 1, T, slots] of each
            query behind each key, in real tokens.
        segment_ids: int32 [B, T], the text that each token of a packed row belongs to; without a
            cache only.
    """
    fresh = cache is not None and cache.is_fresh
    real, start, cache = _real_slots(length, attention_mask, cache)
    bias, contexts = None, {}
    if config.positions == "alibi":
        bias = alibi(config.num_attention_heads, _order(real))
    if relative is not None:
        bias = relative(_distance(real, length, start))
    alone = cache is None or fresh
    unmasked = attention_mask is None and segment_ids is None
    plain = alone and unmasked and SLIDING not in config.kinds
    full = _causal(real, length, start)
    if segment_ids is not None:
        full &= (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    for kind in set(config.kinds):
        mask, rope = None if plain else full, config.rope
        if kind == SLIDING:
            near = _distance(real, length, start) < (config.sliding_window or 0)
            mask, rope = full & near[:, None], config.sliding_rope or rope
        angles = None
        if config.positions == "rope" and positions is not None:
            # One choice for all tokens of a cache, whose keys are rotated already.
            longest = None if cache is None else cache.slots
            angles = rotation(rope, config.head_dim, positions, longest)
        contexts[kind] = Context(mask, bias, angles)
    return contexts, cache


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Return each token's place in its text, int32 [B, T], from the texts' ids of packed rows.

    Example:
        >>> segment_positions(jnp.array([[1, 1, 1, 2, 2]]))
        Array([[0, 1, 2, 0, 1]], dtype=int32)
    """
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    starts = jnp.where((segment_ids != before) & (index > 0), index, 0)
    return index - jax.lax.cummax(starts, axis=1)


def encoder_contexts(
    attention_mask: jax.Array | None, bias: jax.Array | None = None
) -> Mapping[str, Context]:
    """Return the contexts of an encoder, where every token sees every real token."""
    return {FULL: Context(encoder_mask(attention_mask), bias)}


def encoder_mask(attention_mask: jax.Array | None) -> jax.Array:
    """Return the mask of the keys of an encoder, bool [B or 1, 1, 1, T or 1]."""
    if attention_mask is None:
        return jnp.ones((1, 1, 1, 1), jnp.bool_)
    return attention_mask[:, None, None, :]


def _real_slots(length, attention_mask, cache):
    """Return bool [B or 1, slots], the slot of the first token, and the cache moved on."""
    if cache is None:
        real = jnp.ones((1, length), jnp.bool_) if attention_mask is None else attention_mask
        return real, 0, None
    taken = _taken(cache)
    if taken + length > cache.slots:
        slots = f"the cache has {cache.slots} slots, {taken} of them taken"
        raise ValueError(f"ids have {length} tokens, and {slots}")
    rows = cache.valid.shape[0]
    new = jnp.ones((rows, length), jnp.bool_) if attention_mask is None else attention_mask
    valid = jax.lax.dynamic_update_slice_in_dim(cache.valid, new, cache.length, axis=1)
    moved = cache._replace(valid=valid)
    return (new, 0, moved) if cache.is_fresh else (valid, cache.length, moved)


def _taken(cache: KVCache) -> int:
    """Return how many slots are taken, as far as is known: 0 while the length is traced."""
    length = cache.length
    return int(length) if isinstance(length, np.generic) or is_concrete(length) else 0


def _order(real: jax.Array) -> jax.Array:
    return jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1


def _causal(real: jax.Array, length: int, start) -> jax.Array:
    query = start + jnp.arange(length)
    before = jnp.arange(real.shape[1])[None, :] <= query[:, None]  # [T, slots]
    return real[:, None, None, :] & before[None, None]


def _distance(real: jax.Array, length: int, start) -> jax.Array:
    order = _order(real)
    query = jax.lax.dynamic_slice_in_dim(order, start, length, axis=1)
    return query[:, :, None] - order[:, None, :]
