"""allocate_bits: more bits for the weights whose errors the output feels most."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.calibration.moments import run_batch, tuples
from qjax.core.blockwise import quantize
from qjax.core.config import QuantConfig
from qjax.core.qtensor import QTensor
from qjax.swap.leaves import iter_leaves, path_string
from qjax.swap.linen import quantize_params
from qjax.swap.nnx import quantize_model

Distance = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class _Choice:
    format: str
    nbytes: int
    error: float


def allocate_bits(
    x: Any,
    batches: Iterable[Any],
    budget_bits: float,
    *,
    cfg: QuantConfig = QuantConfig(),
    formats: Sequence[str] = ("nf4", "int8"),
    call: Callable[..., jax.Array] | None = None,
    distance: Distance | None = None,
) -> QuantConfig:
    """Choose a format for each weight, so that the output errs least within a number of bytes.

    Each weight alone is quantized in each format, the rest of the model in floating point, and the
    distance of the outputs is measured. From the smallest format everywhere, the upgrade with the
    most gain a byte is taken until no other fits.

    Args:
        x: a float NNX model, or parameters of a Linen one. It is not changed.
        batches: what it is called with; a tuple is several arguments.
        budget_bits: average bits of the weights that are quantized, scales included.
        cfg: which weights, and the fields other than the format.
        formats: those to choose from.
        call: for parameters, `call(params, *batch)`.
        distance: of two outputs, quantized first; the mean squared difference by default. For
            language models the KL divergence says more.

    Returns:
        `cfg` with an override for each weight.

    Raises:
        ValueError: no batches or ones that do not fit the model, no weight to quantize, or a
            budget below the smallest format's.

    Example:
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
        >>> cfg = qjax.allocate_bits(model, [jnp.ones((2, 64))], budget_bits=8.6)
        >>> cfg.at("layers/0/kernel").format
        'int8'
    """
    data = list(tuples(batches))
    if not data:
        raise ValueError("batches is empty: sensitivities are measured on data")
    plan = _weights(x, cfg)
    model = _Model(x, call)
    floats = lambda *batch: model.run({}, batch)  # noqa: E731
    wanted = [run_batch(floats, batch, i) for i, batch in enumerate(data)]
    distance = jax.jit(distance or (lambda a, b: jnp.mean((a - b) ** 2)))

    def choice(path: str, like: QTensor, format: str) -> _Choice:
        w, axes, batch_ndim = model.leaves[path], like.contract_axes, len(like.batch_shape)
        q = quantize(w, cfg.with_format(format), axes, batch_ndim=batch_ndim, name=path)
        decoded = {path: q.dequantize(w.dtype)}
        errors = [distance(model.run(decoded, b), y) for b, y in zip(data, wanted, strict=True)]
        return _Choice(format, q.nbytes, sum(map(float, errors)) / len(errors))

    choices = {path: [choice(path, q, f) for f in formats] for path, q in plan.items()}
    sizes = sum(q.size for q in plan.values())
    chosen = _greedy(choices, budget_bits * sizes / 8, budget_bits, sizes)
    overrides = [(f"^{re.escape(path)}$", {"format": c.format}) for path, c in chosen.items()]
    return dataclasses.replace(cfg, overrides=(*overrides, *cfg.overrides))


def _weights(x: Any, cfg: QuantConfig) -> dict[str, QTensor]:
    """Return what would be quantized, by path."""
    if isinstance(x, nnx.Module):
        quantized = quantize_model(nnx.clone(x), cfg)
    else:
        quantized = quantize_params(x, cfg)
    return {path: leaf for path, leaf, _ in iter_leaves(quantized) if isinstance(leaf, QTensor)}


class _Model:
    """A model compiled once, to be called with some weights replaced."""

    def __init__(self, x: Any, call: Callable[..., jax.Array] | None):
        if isinstance(x, nnx.Module):
            graphdef, x = nnx.split(x)
            inner = call or (lambda model, *batch: model(*batch))
            call = lambda state, *batch: inner(nnx.merge(graphdef, state), *batch)  # noqa: E731
        elif call is None:
            raise ValueError("call must say how parameters are called: call(params, *batch)")
        flat, self._treedef = jax.tree_util.tree_flatten_with_path(x)
        self.leaves = {path_string(path): leaf for path, leaf in flat}
        self._call = jax.jit(call)

    def run(self, replaced: dict[str, jax.Array], batch: tuple) -> jax.Array:
        leaves = [replaced.get(path, leaf) for path, leaf in self.leaves.items()]
        return self._call(jax.tree.unflatten(self._treedef, leaves), *batch)


def _greedy(
    choices: dict[str, list[_Choice]], budget: float, budget_bits: float, size: int
) -> dict[str, _Choice]:
    chosen = {path: min(options, key=lambda c: c.nbytes) for path, options in choices.items()}
    used = sum(c.nbytes for c in chosen.values())
    if used > budget:
        raise ValueError(
            f"budget_bits={budget_bits} cannot be met: the smallest of the formats needs "
            f"{8 * used / size:.3f} bits a weight"
        )
    while True:
        upgrades = [
            ((chosen[path].error - c.error) / (c.nbytes - chosen[path].nbytes), path, c)
            for path, options in choices.items()
            for c in options
            if c.error < chosen[path].error and 0 < c.nbytes - chosen[path].nbytes <= budget - used
        ]
        if not upgrades:
            return chosen
        _, path, best = max(upgrades, key=lambda upgrade: upgrade[0])
        used += best.nbytes - chosen[path].nbytes
        chosen[path] = best
