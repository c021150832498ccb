"""How the next token is chosen: the options of sampling as arrays, and the draw itself."""

import dataclasses
import functools
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_STOP_SLOTS = 8  # stop tokens are padded to a multiple of this


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["stop", "key", "temperature", "top_p"],
    meta_fields=["greedy", "top_k"],
)
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Only another kind compiles anew: `greedy`, `top_k`, a `top_p` or none.

    Attributes:
        stop: int32 [n], padded with -1.
        key: of the draws.
        temperature, top_p: float32 [].
        greedy: the likeliest token.
        top_k: as in `generate`.
    """

    stop: Any
    key: Any
    temperature: Any
    top_p: Any
    greedy: bool
    top_k: int | None


def make_sampling(temperature=0.0, top_k=None, top_p=None, stop_tokens=(), key=None) -> Sampling:
    """Check the options, which are those of `qjax.generate.generate`."""
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
    return Sampling(
        stop=_stop_array(stop_tokens),
        key=jax.random.key(0) if key is None else key,
        temperature=np.float32(temperature),
        top_p=None if top_p is None else np.float32(top_p),
        greedy=temperature == 0,
        top_k=None if top_k is None else int(top_k),
    )


def choose(sampling: Sampling, logits: jax.Array, done: jax.Array, step):
    """Return the next token of each row, int32 [B], and which rows have ended with it.

    Args:
        logits: float32 [B, vocab].
        done: bool [B], the rows that have ended before.
        step: of the generation, which the draw depends on.
    """
    if sampling.greedy:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        key = jax.random.fold_in(sampling.key, step)
        token = sample(logits, key, sampling.temperature, sampling.top_k, sampling.top_p)
    token = jnp.where(done, sampling.stop[0], token)
    return token, done | jnp.any(token[:, None] == sampling.stop[None, :], axis=1)


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


def _stop_array(stop_tokens) -> np.ndarray:
    """Return the stop tokens as int32, padded with -1 (no token) to a multiple of eight."""
    stops = [int(token) for token in stop_tokens]
    if any(token < 0 for token in stops):
        raise ValueError(f"stop_tokens={stops} must be token ids, 0 or more")
    slots = -(-max(len(stops), 1) // _STOP_SLOTS) * _STOP_SLOTS
    return np.asarray(stops + [-1] * (slots - len(stops)), np.int32)
