"""Moments of what multiplies each 4-bit weight, the means of |x| and x x^T, while a model runs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.concrete import is_concrete
from qjax.ops import trace


@jax.jit
def _sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = x.astype(jnp.float32)
    return jnp.abs(x).sum(axis=-2), jnp.einsum("...mi,...mj->...ij", x, x)


class Moments:
    """Sums of |x| and x x^T, and the number of rows x, by path."""

    def __init__(self):
        self.sums: dict[str, tuple[jax.Array, jax.Array]] = {}
        self.rows: dict[str, int] = {}

    def add(self, path: str, x: jax.Array) -> None:
        """Add float [*batch, M, K] that multiplies the weight at `path`."""
        x = jnp.asarray(x)
        if not is_concrete(x):
            raise ValueError(
                f"{path}: the activations are traced, not computed; calibrate outside jit, with "
                "layers that are not scanned (from_pretrained(..., scan_layers=False))"
            )
        sums, before = _sums(x), self.sums.get(path)
        self.sums[path] = sums if before is None else jax.tree.map(jnp.add, before, sums)
        self.rows[path] = self.rows.get(path, 0) + x.shape[-2]

    def mean(self, path: str) -> tuple[jax.Array, jax.Array]:
        """Return the means of |x| [*batch, K] and of x x^T [*batch, K, K].

        Raises:
            ValueError: nothing multiplied this weight.
        """
        if not self.rows.get(path):
            raise ValueError(f"{path}: no activations: the calibration data never reach this layer")
        sizes, products = self.sums[path]
        return sizes / self.rows[path], products / self.rows[path]


def tuples(batches: Iterable[Any]) -> Iterator[tuple]:
    """Yield the arguments of each call: a batch that is no tuple is one argument."""
    for batch in batches:
        yield batch if isinstance(batch, tuple) else (batch,)


def run_batch(call: Callable[..., Any], batch: tuple, index: int) -> Any:
    """Return `call(*batch)`; what it raises for batches that do not fit names the batch."""
    try:
        return call(*batch)
    except (TypeError, ValueError) as error:
        raise ValueError(f"batches[{index}] does not fit the model: {error}") from error


def observed_moments(
    call: Callable[..., Any], names: Mapping[int, str], batches: Iterable[Any]
) -> Moments:
    """Run `call(*batch)` for each batch and sum up what multiplies each weight.

    Args:
        names: the path of a weight by the id of its packed array, where no layer says it.

    Raises:
        ValueError: no batches, or activations that are NaN or infinite.
    """
    moments = Moments()
    count = 0
    with trace.observing(moments.add, names):
        for batch in tuples(batches):
            run_batch(call, batch, count)
            count += 1
    if not count:
        raise ValueError("batches is empty: calibration needs at least one")
    for path, (_, products) in moments.sums.items():
        if not jnp.isfinite(products).all():
            raise ValueError(f"{path}: the activations of the calibration data hold NaN or inf")
    return moments
