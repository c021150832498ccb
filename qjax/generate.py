"""Text generation: one jitted prefill, then the whole decode loop on the device.

Works on any `LanguageModel` that is an `nnx.Module`; knows nothing of how it stores its weights.

**Compilations.** Prompts are padded on the left to a bucket of columns (32, 64, 96, ...; above 256
at most 25 % more than needed), and the cache holds a bucket of slots. The prefill is compiled once
for each (batch size, prompt bucket, slots bucket), the loop once for each (batch size, slots
bucket, kind of sampling, `top_k`). Kinds of sampling are greedy (`temperature=0`) and random, the
latter with and without `top_p`. Another prompt, `max_new_tokens`, `temperature`, `top_p`, key or
set of up to eight stop tokens within the same buckets compiles nothing.
"""

import functools
import numbers
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

_STOP_SLOTS = 8  # stop tokens are padded to a multiple of this


class LanguageModel(Protocol):
    """What `generate` asks of a model."""

    config: Any
    dtype: Any  # of the computation

    def init_cache(self, batch: int, slots: int) -> Any:
        """Return an empty key-value cache with an attribute `slots`."""

    def hidden(self, ids, attention_mask=None, *, positions=None, cache=None) -> Any:
        """Return the last stream [B, T, hidden] and the cache with the tokens appended."""

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Return float32 [..., vocab]."""
        ...


def generate(
    model: LanguageModel,
    ids,
    attention_mask=None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: tuple[int, ...] = (),
    key: jax.Array | None = None,
) -> jax.Array:
    """Continue each row of `ids` by up to `max_new_tokens` tokens.

    Args:
        ids: int [B, T].
        attention_mask: int or bool [B, T], 0 on padding, which may be on either side; every row
            needs a real token. None: no padding.
        temperature: 0 takes the likeliest token; above, logits are divided by it and sampled.
        top_k: sample among the `top_k` likeliest tokens.
        top_p: sample among the likeliest tokens that together reach this probability (nucleus
            sampling, arXiv:1904.09751), after `top_k`.
        stop_tokens: a row ends at the first of these that it produces (which is kept); the rest of
            the row is filled with `stop_tokens[0]`. The loop ends when all rows have ended.
        key: JAX random key; needed when `temperature > 0`.

    Returns:
        int32 [B, T + max_new_tokens]: `ids`, then the new tokens (after right padding too).

    Raises:
        ValueError: an option out of its range, or one that would have no effect; ids outside the
            vocabulary; more tokens than `config.max_position_embeddings`.

    Example:
        >>> out = model.generate(ids, max_new_tokens=8)  # doctest: +SKIP
    """
    ids, attention_mask = as_tokens(ids, attention_mask)
    _check_tokens(model.config, ids, attention_mask, max_new_tokens)
    _check_sampling(temperature, top_k, top_p, key)
    stop = _stop_array(stop_tokens)
    if max_new_tokens == 0:
        return ids
    model = nnx.view(model, deterministic=True, raise_if_not_found=False)  # dropout off
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    state = nnx.merge_state(_cast(adapters, model.dtype), rest)
    padded, mask = _left_pad(ids, attention_mask)
    prompt = padded.shape[1]
    slots = _bucket(prompt + max_new_tokens)
    logits, cache = _prefill(graphdef, state, padded, mask, slots)
    tokens, _ = _decode(
        graphdef,
        state,
        logits,
        cache,
        jnp.sum(mask, axis=1, dtype=jnp.int32),
        jnp.int32(max_new_tokens),
        stop,
        jax.random.key(0) if key is None else key,
        jnp.float32(temperature),
        None if top_p is None else jnp.float32(top_p),
        greedy=temperature == 0,
        top_k=top_k,
    )
    return jnp.concatenate([ids, tokens[:, :max_new_tokens]], axis=1)


def as_tokens(ids, attention_mask=None) -> tuple[jax.Array, jax.Array | None]:
    """Return ids as int32 and the mask as bool, both [B, T]; raise when they are anything else."""
    dtype = jnp.result_type(ids)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"ids must be an integer array, not {dtype}")
    if jnp.ndim(ids) != 2 or 0 in jnp.shape(ids):
        raise ValueError(f"ids has shape {jnp.shape(ids)}, must be [batch, tokens], neither 0")
    ids = jnp.asarray(ids, jnp.int32)
    if attention_mask is None:
        return ids, None
    if jnp.shape(attention_mask) != ids.shape:
        raise ValueError(
            f"attention_mask has shape {jnp.shape(attention_mask)}, "
            f"must be that of ids: {ids.shape}"
        )
    return ids, jnp.asarray(attention_mask) != 0


def sample(
    logits: jax.Array, key: jax.Array, temperature, top_k: int | None = None, top_p=None
) -> jax.Array:
    """Draw one int32 token [B] from each row of float32 logits [B, vocab]."""
    logits = logits / temperature
    if top_k is None and top_p is None:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    count = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
    logits, tokens = jax.lax.top_k(logits, count)  # likeliest first
    if top_p is not None:
        probabilities = jax.nn.softmax(logits)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        logits = jnp.where(before < top_p, logits, -jnp.inf)
    choice = jax.random.categorical(key, logits)
    return jnp.take_along_axis(tokens, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _prefill(graphdef, state, ids, mask, slots: int):
    """Run the prompt; return the logits [B, vocab] after its last token and the filled cache."""
    model = nnx.merge(graphdef, state)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    cache = model.init_cache(ids.shape[0], slots)
    hidden, cache = model.hidden(ids, mask, positions=positions, cache=cache)
    last = ids.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)  # the last real token of each row
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    return model.logits(hidden)[:, 0], cache


@functools.partial(
    jax.jit, static_argnums=(0,), static_argnames=("greedy", "top_k"), donate_argnums=(3,)
)
def _decode(
    graphdef, state, logits, cache, lengths, steps, stop, key, temperature, top_p, *, greedy, top_k
):
    """Return the new tokens int32 [B, slots], of which `steps` columns count, and the cache.

    The cache is returned only so that its donated buffers are updated in place.
    """

    def choose(logits, done, key):
        if greedy:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            token = sample(logits, key, temperature, top_k, top_p)
        token = jnp.where(done, stop[0], token)
        return token, done | jnp.any(token[:, None] == stop[None, :], axis=1)

    def unfinished(carry):
        step, _, _, done, _ = carry
        return (step < steps) & ~jnp.all(done)

    def advance(carry):
        step, token, tokens, done, cache = carry
        # A row that has ended goes on writing slots that nobody reads.
        positions = (lengths + step - 1)[:, None]
        model = nnx.merge(graphdef, state)
        hidden, cache = model.hidden(token[:, None], positions=positions, cache=cache)
        step_key = jax.random.fold_in(key, step)
        token, done = choose(model.logits(hidden[:, 0]), done, step_key)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, axis=1)
        return step + 1, token, tokens, done, cache

    batch = logits.shape[0]
    first, done = choose(logits, jnp.zeros((batch,), jnp.bool_), jax.random.fold_in(key, 0))
    tokens = jnp.full((batch, cache.slots), stop[0], jnp.int32).at[:, 0].set(first)
    carry = (jnp.int32(1), first, tokens, done, cache)
    _, _, tokens, _, cache = jax.lax.while_loop(unfinished, advance, carry)
    return tokens, cache


@functools.partial(jax.jit, static_argnums=1)
def _cast(adapters, dtype):
    """Cast adapters once, as each product would."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), adapters)


def _left_pad(ids: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    mask = jnp.ones(ids.shape, jnp.bool_) if mask is None else mask
    width = ((0, 0), (_bucket(ids.shape[1]) - ids.shape[1], 0))
    return jnp.pad(ids, width), jnp.pad(mask, width)


def _bucket(n: int) -> int:
    """Round up to a multiple of 32, or of an eighth of the next power of two, if more."""
    step = max(32, (1 << n.bit_length()) // 8)
    return -(-n // step) * step


def _check_tokens(config, ids, mask, max_new_tokens) -> None:
    """Raise unless the prompt fits the model; what is traced is not looked at."""
    if not isinstance(max_new_tokens, numbers.Integral) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens!r} must be an int, 0 or more")
    total, limit = ids.shape[1] + max_new_tokens, config.max_position_embeddings
    if limit is not None and total > limit:
        raise ValueError(
            f"the prompt and max_new_tokens are {total} tokens, max_position_embeddings={limit}"
        )
    if not isinstance(ids, Tracer):
        tokens, vocab = np.asarray(ids), config.vocab_size
        outside = tokens[(tokens < 0) | (tokens >= vocab)]
        if outside.size:
            raise ValueError(
                f"ids hold {outside[0]}, must be from 0 to {vocab - 1} (vocab_size={vocab})"
            )
    if mask is not None and not isinstance(mask, Tracer):
        empty = np.flatnonzero(~np.asarray(mask).any(axis=1))
        if empty.size:
            raise ValueError(f"attention_mask is 0 on all of row {empty[0]}: nothing to continue")


def _check_sampling(temperature, top_k, top_p, key) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature!r} must be finite, 0 or more")
    if top_k is not None and (not isinstance(top_k, numbers.Integral) or top_k < 1):
        raise ValueError(f"top_k={top_k!r} must be an int, 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p!r} must be above 0 and at most 1")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError(
            f"top_k={top_k!r} and top_p={top_p!r} have no effect at temperature=0 (greedy)"
        )
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature!r} samples: pass key=jax.random.key(seed)")


def _stop_array(stop_tokens) -> jax.Array:
    """Return the stop tokens as int32, padded with -1 (no token) to a multiple of eight."""
    stops = [int(token) for token in stop_tokens]
    if any(token < 0 for token in stops):
        raise ValueError(f"stop_tokens={stops} must be token ids, 0 or more")
    slots = -(-max(len(stops), 1) // _STOP_SLOTS) * _STOP_SLOTS
    return jnp.asarray(stops + [-1] * (slots - len(stops)), jnp.int32)
