"""Text generation: one jitted prefill, then the whole decode loop on the device.

Works on any `LanguageModel` that is an `nnx.Module`; of how it stores its weights it knows that
adapters are `nnx.LoRAParam`.

**Compilations.** Prompts are padded on the left to a bucket of columns (32, 64, 96, ...; above 256
at most 25 % more than needed), and the cache holds a bucket of slots. The prefill is compiled once
for each (batch size, prompt bucket, slots bucket), apart for prompts that need no padding; the loop
once for each (batch size, slots bucket, kind of sampling, `top_k`). Kinds of sampling are greedy
(`temperature=0`) and random, the latter with and without `top_p`. Another prompt, `max_new_tokens`,
`temperature`, `top_p`, key or set of up to eight stop tokens within the same buckets compiles
nothing.
"""

import dataclasses
import functools
import numbers
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from pallas_kernels.dispatch import target
from qjax.ops.lora import FEW_ROWS
from qjax.sampling import Sampling, choose, make_sampling


class LanguageModel(Protocol):
    """What `generate` asks of a model."""

    config: Any
    dtype: Any  # of the computation

    def init_cache(self, batch: int, slots: int, kv_format: str | None = None) -> Any:
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
    kv_format: str | None = None,
) -> jax.Array:
    """Continue each row of `ids` by up to `max_new_tokens` tokens.

    Args:
        ids: int [B, T], an array or lists.
        attention_mask: int or bool [B, T], 0 on padding, which may be on either side; every row
            needs a real token. None: no padding.
        temperature: 0 takes the likeliest token; above, logits are divided by it and sampled.
        top_k: sample among the `top_k` likeliest tokens.
        top_p: sample among the likeliest tokens that together reach this probability (nucleus
            sampling, arXiv:1904.09751), after `top_k`.
        stop_tokens: a row ends at the first of these that it produces (which is kept); the rest of
            the row is filled with `stop_tokens[0]`. The loop ends when all rows have ended.
        key: JAX random key; needed when `temperature > 0`.
        kv_format: "int8" or "int4" holds the keys and values of the tokens so far in 8.5 or 4.5
            bits a number; None in the dtype of the computation.

    Returns:
        int32 [B, T + max_new_tokens]: `ids`, then the new tokens (after right padding too).

    Raises:
        ValueError: an option out of its range, or one that would have no effect; ids outside the
            vocabulary; more tokens than `config.max_position_embeddings`.

    Example:
        >>> out = model.generate(ids, max_new_tokens=8)  # doctest: +SKIP
    """
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "stop_tokens": stop_tokens,
        "key": key,
    }
    session = _start(model, ids, attention_mask, max_new_tokens, kv_format, **options)
    if session is None:
        return as_tokens(ids)[0]
    tokens = session.run(max_new_tokens)
    return jnp.concatenate([as_tokens(ids)[0], tokens[:, :max_new_tokens]], axis=1)


def stream(
    model: LanguageModel,
    ids,
    attention_mask=None,
    *,
    max_new_tokens: int = 64,
    every: int = 8,
    **options,
) -> Iterator[np.ndarray]:
    """Yield the new tokens of `generate` as they come, on the host.

    The next tokens are asked for before these are given, so that the device need not wait.

    Args:
        model, ids, attention_mask, max_new_tokens: as in `generate`, and so are the other options.
        every: new tokens between two yields, 1 or more; each yield costs a call to the device.

    Yields:
        int32 [B, n], `n` at most `every`; the first after the prompt is read. Together they are
        what `generate` appends, cut short once all rows have ended.

    Raises:
        ValueError: as `generate`, at the first `next`; or `every` below 1.

    Example:
        >>> for tokens in model.stream(ids, max_new_tokens=64, every=4):  # doctest: +SKIP
        ...     print(tokenizer.decode(tokens[0]), end="", flush=True)
    """
    if not isinstance(every, numbers.Integral) or every < 1:
        raise ValueError(f"every={every!r} must be an int, 1 or more")
    session = _start(model, ids, attention_mask, max_new_tokens, **options)
    if session is None:
        return
    ends = [*range(every, max_new_tokens, every), max_new_tokens]
    tokens, start = session.run(ends[0]), 0
    ahead = tokens
    for i, end in enumerate(ends):
        # Sliced before the buffer is donated to the next steps, and fetched while they run.
        part, done = tokens[:, start:end], session.state.done
        if i + 1 < len(ends):
            done = jnp.copy(done)
            ahead = session.run(ends[i + 1])
        yield np.asarray(part)
        if np.asarray(done).all():
            return
        tokens, start = ahead, end


def as_tokens(ids, attention_mask=None) -> tuple[jax.Array, jax.Array | None]:
    """Return ids, maybe lists, as int32 and the mask as bool, both [B, T]; or raise."""
    if not hasattr(ids, "dtype"):
        try:
            ids = np.asarray(ids)
        except ValueError as error:
            raise ValueError("ids has rows of unequal length: pad them") from error
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids must be integers, the tokens of a text, not {ids.dtype}")
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


class _State(NamedTuple):
    """Where a generation stands; its arrays are donated from step to step.

    Attributes:
        step: int32 [], the new tokens so far.
        token: int32 [B], the last of them.
        tokens: int32 [B, slots], all of them.
        done: bool [B], the rows that have ended.
        lengths: int32 [B], real tokens of the prompts.
        cache: the model's.
    """

    step: jax.Array | np.int32
    token: jax.Array
    tokens: jax.Array
    done: jax.Array
    lengths: jax.Array
    cache: Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["adapters", "rest"],
    meta_fields=["by_columns"],
)
@dataclasses.dataclass(frozen=True)
class _Params:
    """The arrays of a model; with `by_columns`, its adapters are transposed."""

    adapters: Any
    rest: Any
    by_columns: bool


@dataclasses.dataclass
class _Session:
    """A generation under way."""

    graphdef: Any
    params: Any
    state: _State
    sampling: Sampling

    def run(self, until: int) -> jax.Array:
        """Go on until so many new tokens; return those so far, int32 [B, slots]."""
        arguments = self.graphdef, self.params, self.state, np.int32(until), self.sampling
        self.state = _decode(*arguments)
        return self.state.tokens


def _start(
    model, ids, attention_mask, max_new_tokens, kv_format=None, **options
) -> _Session | None:
    """Check the arguments and read the prompt; None where no token is asked for."""
    ids, attention_mask = as_tokens(ids, attention_mask)
    _check_tokens(model.config, ids, attention_mask, max_new_tokens)
    sampling = make_sampling(**options)
    if max_new_tokens == 0:
        return None
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    prompt = _bucket(ids.shape[1])
    slots = _bucket(prompt + max_new_tokens)
    if attention_mask is None and prompt > ids.shape[1]:
        attention_mask = jnp.ones(ids.shape, jnp.bool_)
    pad = ((0, 0), (prompt - ids.shape[1], 0))
    if attention_mask is not None:
        ids, attention_mask = jnp.pad(ids, pad), jnp.pad(attention_mask, pad)
    # Once, as each product would; and transposed as the kernels for few rows read them.
    by_columns = len(ids) <= FEW_ROWS and target().is_cuda
    params = _Params(_cast(adapters, model.dtype, by_columns), rest, by_columns)
    logits, lengths, cache = _prefill(graphdef, params, ids, attention_mask, slots, kv_format)
    token, tokens, done = _first(logits, slots, sampling)
    state = _State(np.int32(1), token, tokens, done, lengths, cache)
    return _Session(graphdef, params, state, sampling)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _prefill(graphdef, params, ids, mask, slots: int, kv_format: str | None):
    """Read the prompt; return the logits [B, vocab] after it, its length and the filled cache."""
    model = _model(graphdef, params)
    batch, width = ids.shape
    formats = () if kv_format is None else (kv_format,)
    cache = model.init_cache(batch, slots, *formats)
    if mask is None:
        lengths = jnp.full((batch,), width, jnp.int32)
        hidden, cache = model.hidden(ids, cache=cache)
        hidden = hidden[:, -1]
    else:
        lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        hidden, cache = model.hidden(ids, mask, positions=positions, cache=cache)
        last = width - 1 - jnp.argmax(mask[:, ::-1], axis=1)  # the last real token of each row
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return model.logits(hidden), lengths, cache


@functools.partial(jax.jit, static_argnums=(1,))
def _first(logits, slots: int, sampling: Sampling):
    """Choose the first new token; return it, the array of all to come, and the rows that end."""
    none = jnp.zeros(logits.shape[:1], jnp.bool_)
    token, done = choose(sampling, logits, none, 0)
    tokens = jnp.full((logits.shape[0], slots), sampling.stop[0], jnp.int32)
    return token, tokens.at[:, 0].set(token), done


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def _decode(graphdef, params, state: _State, until, sampling: Sampling):
    """Generate until there are `until` new tokens or all rows have ended."""

    def unfinished(state):
        return (state.step < until) & ~jnp.all(state.done)

    def advance(state):
        # A row that has ended goes on writing slots that nobody reads.
        positions = (state.lengths + state.step - 1)[:, None]
        model = _model(graphdef, params)
        hidden, cache = model.hidden(state.token[:, None], positions=positions, cache=state.cache)
        logits = model.logits(hidden[:, 0])
        token, done = choose(sampling, logits, state.done, state.step)
        tokens = jax.lax.dynamic_update_slice_in_dim(
            state.tokens, token[:, None], state.step, axis=1
        )
        return _State(state.step + 1, token, tokens, done, state.lengths, cache)

    return jax.lax.while_loop(unfinished, advance, state)


def _model(graphdef, params: _Params) -> Any:
    """Put the model together with its dropout off: while tracing, where it costs nothing."""
    model: Any = nnx.merge(graphdef, params.adapters, params.rest)
    if params.by_columns:
        for _, module in nnx.iter_modules(model):
            layer: Any = module
            if getattr(layer, "lora_a", None) is None:
                continue
            if hasattr(layer, "lora_by_columns") and layer.lora_magnitude is None:
                layer.lora_by_columns = True
            else:  # of another kind, or DoRA's, which is also multiplied by B
                layer.lora_a = layer.lora_a.replace(layer.lora_a[...].mT)
                layer.lora_b = layer.lora_b.replace(layer.lora_b[...].mT)
    return nnx.view(model, deterministic=True, raise_if_not_found=False)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _cast(adapters, dtype, by_columns: bool):
    """Cast adapters, and transpose every A and B for `by_columns`."""

    def one(path, leaf):
        names = {getattr(key, "key", None) for key in path}
        turn = by_columns and not names.isdisjoint(("lora_a", "lora_b"))
        return (leaf.mT if turn else leaf).astype(dtype)

    return jax.tree_util.tree_map_with_path(one, adapters)


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
