"""How far a quantized model is from the one it was: in what it says, and weight by weight."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax.core.qtensor import QTensor
from qjax.swap.leaves import iter_leaves


@dataclasses.dataclass(frozen=True)
class Quality:
    """A model's next-token predictions over a text, and against a reference's.

    Attributes:
        perplexity: exp of the mean negative log likelihood of a token.
        tokens: tokens that were predicted.
        kl: mean Kullback-Leibler divergence of the predictions from the reference's, in nats; None
            without a reference.
        agreement: share of tokens where both have the same most likely token; None without.
        reference_perplexity: of the reference; None without.
    """

    perplexity: float
    tokens: int
    kl: float | None = None
    agreement: float | None = None
    reference_perplexity: float | None = None


def evaluate(
    model: Callable[..., jax.Array],
    batches: Iterable[Any],
    reference: Callable[..., jax.Array] | None = None,
    *,
    kv_format: str | None = None,
) -> Quality:
    """Measure a causal language model on token ids.

    Args:
        model: ids int32 [B, T] to logits [B, T, vocab]; an NNX model or a function.
        batches: of ids, or of pairs (ids, scored), where scored is bool [B, T] and False on tokens
            that do not count: padding, or what an earlier window has scored. The first token of a
            row is not predicted. One batch is held at a time.
        reference: another model, such as the one in floating point, to compare with.
        kv_format: have the model (of `qjax.models`) read keys and values from a cache in this
            format, as `generate` does; the reference does not.

    Raises:
        TypeError: a kv_format for what has no such cache.
        ValueError: batches are empty, not integers of rank 2, or shorter than two tokens; a
            reference with another vocabulary.

    Example:
        >>> uniform = lambda ids: jnp.zeros((*ids.shape, 10))
        >>> round(evaluate(uniform, [np.zeros((1, 5), np.int32)]).perplexity, 3)
        10.0
    """
    run = _compiled(model, kv_format)
    against = None if reference is None else _compiled(reference)
    sums = np.zeros(4)
    count = 0
    for batch in batches:
        ids, scored = _checked(batch)
        logits, others = run(ids), against and against(ids)
        if others is not None and others.shape != logits.shape:
            raise ValueError(
                f"reference has a vocabulary of {others.shape[-1]} tokens, the model one of "
                f"{logits.shape[-1]}: they cannot be compared"
            )
        sums += np.asarray(_sums(logits, others, ids, scored))
        count += int(scored[:, 1:].sum())
    if not count:
        raise ValueError("batches is empty: there is nothing to evaluate on")
    loss, other, kl, same = sums / count
    if reference is None:
        return Quality(float(np.exp(loss)), count)
    return Quality(float(np.exp(loss)), count, float(kl), float(same), float(np.exp(other)))


@dataclasses.dataclass(frozen=True)
class Similarity:
    """How near the embeddings of an encoder are to a reference's.

    Attributes:
        cosine: mean cosine of the embeddings of a text.
        lowest: the least of them.
        texts: how many.
    """

    cosine: float
    lowest: float
    texts: int


def compare_embeddings(
    model: Callable[..., jax.Array], batches: Iterable[Any], reference: Callable[..., jax.Array]
) -> Similarity:
    """Compare two encoders: the mean hidden state of each row of tokens is its embedding.

    Args:
        model: (ids int32 [B, T], mask bool [B, T]) to hidden states [B, T, hidden], such as
            `model.encode`.
        batches: of pairs (ids, mask); rows of padding alone do not count.
        reference: another one.

    Raises:
        ValueError: batches are empty, or the embeddings have different sizes.
    """
    cosines: list[float] = []
    for ids, mask in batches:
        hidden, others = model(ids, mask), reference(ids, mask)
        if hidden.shape != others.shape:
            raise ValueError(
                f"reference has embeddings of {others.shape[-1]} numbers, the model of "
                f"{hidden.shape[-1]}: they cannot be compared"
            )
        found = np.asarray(_cosines(hidden, others, jnp.asarray(mask)))
        cosines += found[np.asarray(mask).any(axis=1)].tolist()
    if not cosines:
        raise ValueError("batches is empty: there is nothing to evaluate on")
    return Similarity(float(np.mean(cosines)), min(cosines), len(cosines))


@jax.jit
def _cosines(hidden: jax.Array, others: jax.Array, mask: jax.Array) -> jax.Array:
    # The length of a mean over tokens does not matter here, so that sums do.
    a, b = (jnp.sum(x * mask[..., None], axis=1, dtype=jnp.float32) for x in (hidden, others))
    return jnp.sum(a * b, axis=-1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))


def _compiled(
    model: Callable[..., jax.Array], kv_format: str | None = None
) -> Callable[[jax.Array], jax.Array]:
    if kv_format is not None and not hasattr(model, "init_cache"):
        raise TypeError(f"kv_format={kv_format!r} needs a model of qjax.models, with a cache")
    if not isinstance(model, nnx.Module):
        return jax.jit(model)
    graphdef, state = nnx.split(model)  # weights are arguments, not constants of the program

    @jax.jit
    def run(state, ids):
        model = nnx.merge(graphdef, state)
        return model(ids) if kv_format is None else _cached(model, ids, kv_format)

    return lambda ids: run(state, ids)


def _cached(model: Any, ids: jax.Array, kv_format: str) -> jax.Array:
    """Return the logits of tokens that read each other from a cache."""
    cache = model.init_cache(*ids.shape, kv_format)
    # A first call reads its own keys and values as they are: it gets one token.
    first, cache = model.hidden(ids[:, :1], cache=cache)
    rest, _ = model.hidden(ids[:, 1:], cache=cache)
    return model.logits(jnp.concatenate([first, rest], axis=1))


def _checked(batch: Any) -> tuple[jax.Array, np.ndarray]:
    ids, scored = batch if isinstance(batch, tuple) else (batch, None)
    ids = jnp.asarray(ids)
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer) or ids.shape[1] < 2:
        raise ValueError(
            f"batches must hold token ids [B, T], T at least 2, got {ids.dtype}{list(ids.shape)}"
        )
    scored = np.ones(ids.shape, bool) if scored is None else np.asarray(scored)
    if scored.shape != ids.shape or scored.dtype != bool:
        raise ValueError(
            f"batches: scored must be bool{list(ids.shape)}, as ids, got "
            f"{scored.dtype}{list(scored.shape)}"
        )
    return ids, scored


@jax.jit
def _sums(logits, reference, ids: jax.Array, scored: jax.Array) -> jax.Array:
    """Sum over the scored tokens: loss, the reference's loss, KL and agreement."""
    targets, scored = ids[:, 1:, None], scored[:, 1:]

    def predictions(logits):
        logs = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
        losses = -jnp.take_along_axis(logs, targets, axis=-1)[..., 0]
        return logs, jnp.sum(losses, where=scored)

    logs, loss = predictions(logits)
    if reference is None:
        return jnp.stack([loss, *[jnp.zeros(())] * 3])
    wanted, other = predictions(reference)
    kl = jnp.sum(jnp.sum(jnp.exp(wanted) * (wanted - logs), axis=-1), where=scored)
    same = jnp.sum(wanted.argmax(-1) == logs.argmax(-1), where=scored)
    return jnp.stack([loss, other, kl, same.astype(jnp.float32)])


def layer_errors(x: Any, reference: Any) -> dict[str, float]:
    """Return how far each matrix is from that of a reference, by path.

    Relative, root mean square: ||W - W_ref|| / ||W_ref||. Matrices that are equal are left out;
    layers that are stacked for a scan count one by one, as `layers/0/...`.

    Args:
        x: an NNX model, or parameters.
        reference: the same before it was quantized, or quantized otherwise.

    Raises:
        ValueError: the reference lacks a matrix, or has it in another shape.

    Example:
        >>> layer = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
        >>> quantized = qjax.quantize_model(nnx.clone(layer))
        >>> list(layer_errors(quantized, layer))
        ['kernel']
    """
    others = dict(_matrices(reference))
    errors = {}
    for path, leaf in _matrices(x):
        other = others.get(path)
        if other is None or other.shape != leaf.shape:
            raise ValueError(f"{path}: reference has no weight of shape {list(leaf.shape)}")
        if error := float(_relative_error(_decoded(leaf), _decoded(other))):
            errors[path] = error
    return errors


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A leaf, or one layer of a stack of them, which is read when it is needed."""

    leaf: Any
    index: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.leaf.shape[0 if self.index is None else 1 :])

    def read(self) -> Any:
        index = self.index
        return self.leaf if index is None else jax.tree.map(lambda a: a[index], self.leaf)


def _matrices(x: Any) -> Iterator[tuple[str, _Layer]]:
    """Yield the matrices of a model or tree by path, those of its stacked layers one by one."""
    config = getattr(x, "config", None)
    stacked = isinstance(x, nnx.Module) and getattr(config, "scan_layers", False)
    for path, leaf, _ in iter_leaves(x):
        first, _, rest = path.partition("/")
        if not isinstance(leaf, QTensor) and not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        if not (stacked and first == "layers"):
            layers = [(path, _Layer(leaf, None))]
        else:
            layers = [(f"layers/{i}/{rest}", _Layer(leaf, i)) for i in range(leaf.shape[0])]
        yield from ((path, layer) for path, layer in layers if len(layer.shape) > 1)


def _decoded(layer: _Layer) -> jax.Array:
    leaf = layer.read()
    return leaf.dequantize(jnp.float32) if isinstance(leaf, QTensor) else leaf


@jax.jit
def _relative_error(w, reference):
    difference = w.astype(jnp.float32) - (reference := reference.astype(jnp.float32))
    norm = jnp.linalg.norm(reference)
    return jnp.linalg.norm(difference) / jnp.where(norm > 0, norm, 1)
