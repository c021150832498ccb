"""The demo's training loop, on the steps of `qjax.finetune`."""

from collections.abc import Iterator

from flax import nnx

from qjax.demo.lessons import TokenSet
from qjax.finetune.training import make_optimizer, train_step


def finetune(
    model: nnx.Module, data: TokenSet, *, steps: int, batch_size: int, learning_rate: float
) -> Iterator[float]:
    """Train for `steps` steps, yielding the loss of each. The model changes in place."""
    optimizer = make_optimizer(model, steps, learning_rate)
    for _, batch in zip(range(steps), data.batches(batch_size, seed=0), strict=False):
        yield float(train_step(model, optimizer, batch))
