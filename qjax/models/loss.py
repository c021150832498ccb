"""Cross-entropy over a large vocabulary, a chunk of tokens at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

IGNORED = -100  # the label of a token that does not count, as in Hugging Face
_CHUNK_LOGITS = 2**25  # 128 MiB in float32


def cross_entropy(
    logits: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    labels: jax.Array,
    *,
    chunk_size: int | None = None,
) -> jax.Array:
    """Return the mean negative log-likelihood of labels, without ever holding all logits.

    The backward pass computes each chunk's logits again.

    Args:
        logits: the output head, [..., hidden] to [..., vocab], such as `model.logits`.
        hidden: floating [..., hidden].
        labels: integers [...]; -100 does not count.
        chunk_size: tokens of a chunk; None takes what makes 128 MiB of float32 logits.

    Returns:
        float32 []; 0 where no label counts.

    Raises:
        ValueError: shapes that do not fit, or `chunk_size` below 1.

    Example:
        >>> head = jnp.zeros((4, 10))
        >>> loss = qjax.cross_entropy(lambda h: h @ head, jnp.ones((3, 4)), jnp.array([1, 2, -100]))
        >>> round(float(loss), 4)  # log 10
        2.3026
    """
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels has shape {labels.shape}, must be {hidden.shape[:-1]}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be 1 or more")
    tokens = labels.size
    if chunk_size is None:
        vocab = jax.eval_shape(logits, hidden).shape[-1]
        chunk_size = max(1, _CHUNK_LOGITS // vocab)
    count = -(-tokens // chunk_size)
    chunk = -(-tokens // count)
    padding = count * chunk - tokens
    hidden = jnp.pad(hidden.reshape(tokens, -1), ((0, padding), (0, 0)))
    labels = jnp.pad(labels.reshape(tokens), (0, padding), constant_values=IGNORED)

    @jax.checkpoint
    def chunk_sum(hidden, labels):
        scores = logits(hidden).astype(jnp.float32)
        column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        chosen = jnp.sum(jnp.where(column == labels[:, None], scores, 0), axis=-1)
        return jnp.sum(jnp.where(labels == IGNORED, 0, jax.nn.logsumexp(scores, axis=-1) - chosen))

    chunks = hidden.reshape(count, chunk, -1), labels.reshape(count, chunk)
    total = jnp.sum(jax.lax.map(lambda pair: chunk_sum(*pair), chunks))
    return total / jnp.maximum(jnp.sum(labels != IGNORED), 1).astype(jnp.float32)


def next_labels(
    labels: jax.Array, attention_mask: jax.Array | None, segment_ids: jax.Array | None
) -> jax.Array:
    """Return what each column of int32 [B, T] predicts: the label of the next, or -100."""
    if attention_mask is not None:
        labels = jnp.where(attention_mask, labels, IGNORED)
    shifted = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    if segment_ids is None:
        return shifted
    same = jnp.pad(segment_ids[:, 1:] == segment_ids[:, :-1], ((0, 0), (0, 1)))
    return jnp.where(same, shifted, IGNORED)


def as_labels(array, ids: jax.Array, name: str = "labels") -> jax.Array:
    """Return an integer array of the shape of ids as int32; raise when it is anything else."""
    dtype = jnp.result_type(array)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{name} must be an integer array, not {dtype}")
    if jnp.shape(array) != ids.shape:
        raise ValueError(f"{name} has shape {jnp.shape(array)}, must be that of ids: {ids.shape}")
    return jnp.asarray(array, jnp.int32)
