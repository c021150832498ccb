"""How much a quantized language model differs from the one it was: perplexity, KL, agreement."""

import dataclasses
from collections.abc import Callable, Iterable
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
) -> Quality:
    """Measure a causal language model on token ids.

    Args:
        model: ids int32 [B, T] to logits [B, T, vocab]; an NNX model or a function.
        batches: of ids. The first token of a row is not predicted.
        reference: another model, such as the one in floating point, to compare with.

    Raises:
        ValueError: batches are empty, not integers of rank 2, or shorter than two tokens.

    Example:
        >>> uniform = lambda ids: jnp.zeros((*ids.shape, 10))
        >>> round(evaluate(uniform, [np.zeros((1, 5), np.int32)]).perplexity, 3)
        10.0
    """
    run, against = _compiled(model), None if reference is None else _compiled(reference)
    sums = np.zeros(4)
    count = 0
    for ids in batches:
        ids = _checked(ids)
        sums += np.asarray(_sums(run(ids), against and against(ids), ids))
        count += ids.shape[0] * (ids.shape[1] - 1)
    if not count:
        raise ValueError("batches is empty: there is nothing to evaluate on")
    loss, other, kl, same = sums / count
    if reference is None:
        return Quality(float(np.exp(loss)), count)
    return Quality(float(np.exp(loss)), count, float(kl), float(same), float(np.exp(other)))


def _compiled(model: Callable[..., jax.Array]) -> Callable[[jax.Array], jax.Array]:
    if not isinstance(model, nnx.Module):
        return jax.jit(model)
    graphdef, state = nnx.split(model)  # weights are arguments, not constants of the program
    run = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))
    return lambda ids: run(state, ids)


def _checked(ids: Any) -> jax.Array:
    ids = jnp.asarray(ids)
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer) or ids.shape[1] < 2:
        raise ValueError(
            f"batches must hold token ids [B, T], T at least 2, got {ids.dtype}{list(ids.shape)}"
        )
    return ids


@jax.jit
def _sums(logits: jax.Array, reference: jax.Array | None, ids: jax.Array) -> jax.Array:
    """Sum over tokens: loss, the reference's loss, KL and agreement."""
    targets = ids[:, 1:, None]

    def predictions(logits):
        logs = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
        return logs, -jnp.take_along_axis(logs, targets, axis=-1).sum()

    logs, loss = predictions(logits)
    if reference is None:
        return jnp.stack([loss, *[jnp.zeros(())] * 3])
    wanted, other = predictions(reference)
    kl = jnp.sum(jnp.exp(wanted) * (wanted - logs))
    same = jnp.sum(wanted.argmax(-1) == logs.argmax(-1))
    return jnp.stack([loss, other, kl, same.astype(jnp.float32)])


def layer_errors(x: Any, reference: Any) -> dict[str, float]:
    """Return the relative root-mean-square error of each quantized weight, by path.

    Args:
        x: a quantized NNX model, or parameters.
        reference: the same in floating point.

    Raises:
        ValueError: the reference lacks a weight, or has it in another shape.
    """
    floats = {path: leaf for path, leaf, _ in iter_leaves(reference)}
    errors = {}
    for path, q, _ in iter_leaves(x):
        if not isinstance(q, QTensor):
            continue
        w = floats.get(path)
        if w is None or tuple(w.shape) != q.shape:
            raise ValueError(f"{path}: reference has no weight of shape {list(q.shape)}")
        errors[path] = float(_relative_error(q, w))
    return errors


@jax.jit
def _relative_error(q, w):
    w = w.astype(jnp.float32)
    return jnp.linalg.norm(q.dequantize(jnp.float32) - w) / jnp.linalg.norm(w)
