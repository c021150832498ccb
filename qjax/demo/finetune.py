"""The demo's training loop: an ordinary jitted NNX step on the adapters alone."""

from collections.abc import Iterator

import jax
import optax
from flax import nnx

from qjax.demo.lessons import TokenSet


def answer_loss(model: nnx.Module, ids, targets, weights) -> jax.Array:
    """Return the mean cross-entropy of the answers' tokens, in nats."""
    losses = optax.softmax_cross_entropy_with_integer_labels(model(ids), targets)
    return (losses * weights).sum() / weights.sum()


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, batch) -> jax.Array:
    """Update the adapters in place and return the loss; nothing else gets a gradient."""
    adapters = nnx.DiffState(0, nnx.LoRAParam)
    loss, grads = nnx.value_and_grad(answer_loss, argnums=adapters)(model, *batch)
    optimizer.update(model, grads)
    return loss


def finetune(
    model: nnx.Module, data: TokenSet, *, steps: int, batch_size: int, learning_rate: float
) -> Iterator[float]:
    """Train for `steps` steps, yielding the loss of each. The model changes in place."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, steps // 10), steps, learning_rate / 10
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    for _, batch in zip(range(steps), data.batches(batch_size, seed=0), strict=False):
        yield float(train_step(model, optimizer, batch))
