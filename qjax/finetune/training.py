"""The training loop: an ordinary jitted NNX step on the adapter alone, in steps that can go on."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx

import qjax
from qjax.finetune.packing import Packed
from qjax.hf.extras import write_whole

_KEPT = 2  # checkpoints; the one before the last is there should the last be damaged


def weighted_loss(model: Any, ids, targets, weights, segments=None) -> jax.Array:
    """Return the mean cross-entropy of the targets that count, in nats.

    Args:
        model: a causal language model.
        ids, targets: int32 [B, T].
        weights: float32 [B, T], 0 for targets that do not count.
        segments: int32 [B, T] of texts packed in a row; None for one text a row.
    """
    logits = model(ids) if segments is None else model(ids, segment_ids=segments)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return (losses * weights).sum() / weights.sum()


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, batch) -> jax.Array:
    """Update the adapter in place and return the loss; nothing else gets a gradient."""
    adapter = nnx.DiffState(0, nnx.LoRAParam)
    loss, grads = nnx.value_and_grad(weighted_loss, argnums=adapter)(model, *batch)
    optimizer.update(model, grads)
    return loss


def make_optimizer(model: nnx.Module, steps: int, learning_rate: float) -> nnx.Optimizer:
    """Return AdamW on the adapter: warm-up over a tenth of the steps, then a cosine to a tenth."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, steps // 10), steps, learning_rate / 10
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
    return nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)


class Checkpoints:
    """The state of a run, every so many steps: adapter, optimizer, random streams and losses.

    Args:
        folder: of the run.
        model: with its adapter.
        optimizer: of the adapter.
    """

    def __init__(self, folder: Path, model: nnx.Module, optimizer: nnx.Optimizer):
        self._folder, self._losses = folder / "checkpoints", folder / "losses.json"
        self._model, self._optimizer = model, optimizer

    def save(self, losses: list[float]) -> None:
        """Save the state after as many steps as there are losses."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step-{len(losses):06d}"
        # First, so that a checkpoint always has its losses; `restore` drops later ones.
        write_whole(self._losses, lambda f: f.write_text(json.dumps(losses)))
        qjax.save(path, self._state(), overwrite=path.exists())
        for old in self._complete()[:-_KEPT]:
            shutil.rmtree(old)

    def restore(self) -> list[float]:
        """Put the last state back, and return the losses of its steps; [] if there is none."""
        for leftover in self._folder.glob("step-*.orbax-checkpoint-tmp*"):  # of a run that was cut
            shutil.rmtree(leftover)
        complete = self._complete()
        if not complete:
            return []
        state = qjax.load(complete[-1], like=self._state())
        nnx.update(self._model, state["model"])
        nnx.update(self._optimizer, state["optimizer"])
        step = int(complete[-1].name.removeprefix("step-"))
        losses = json.loads(self._losses.read_text())
        if len(losses) < step:
            raise ValueError(
                f"{self._losses} has {len(losses)} losses, {complete[-1]} needs {step}"
            )
        return losses[:step]

    def _complete(self) -> list[Path]:
        """Return the whole checkpoints, oldest first: Orbax names one so when it is complete."""
        names = self._folder.glob("step-" + "[0-9]" * 6)
        return sorted(path for path in names if (path / "_CHECKPOINT_METADATA").is_file())

    def _state(self) -> dict[str, Any]:
        trained = nnx.state(self._model, (nnx.LoRAParam, nnx.RngState))
        return {"model": trained, "optimizer": nnx.state(self._optimizer)}


def train(
    model: nnx.Module,
    data: Packed,
    *,
    folder: Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
    save_every: int,
    seed: int,
) -> Iterator[list[float]]:
    """Train up to `steps` steps from where the folder's last checkpoint is.

    Yields:
        The losses of all steps so far, first those that were restored.
    """
    optimizer = make_optimizer(model, steps, learning_rate)
    checkpoints = Checkpoints(folder, model, optimizer)
    losses = checkpoints.restore()
    yield losses
    for step in range(len(losses), steps):
        batch = data.batch(step, batch_size, seed)
        losses.append(float(train_step(model, optimizer, batch)))
        if len(losses) % save_every == 0 or len(losses) == steps:
            checkpoints.save(losses)
        yield losses
