"""Second moments of what multiplies each 4-bit weight: the mean of x x^T, while a model runs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.concrete import is_concrete
from qjax.ops import trace


@jax.jit
def _sums(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return jnp.einsum("...mi,...mj->...ij", x, x)


class Moments:
    """Sums of x x^T and the number of rows x, by path."""

    def __init__(self):
        self.sums: dict[str, jax.Array] = {}
        self.rows: dict[str, int] = {}

    def add(self, path: str, x: jax.Array) -> None:
        """Add float [*batch, M, K] that multiplies the weight at `path`."""
        x = jnp.asarray(x)
        if not is_concrete(x):
            raise ValueError(
                f"{path}: the activations are traced, not computed; calibrate outside jit, with "
                "layers that are not scanned (from_pretrained(..., scan_layers=False))"
            )
        sums = _sums(x)
        self.sums[path] = sums if path not in self.sums else self.sums[path] + sums
        self.rows[path] = self.rows.get(path, 0) + x.shape[-2]

    def mean(self, path: str) -> jax.Array:
        """Return the mean of x x^T [*batch, K, K].

        Raises:
            ValueError: nothing multiplied this weight.
        """
        if path not in self.sums:
            raise ValueError(f"{path}: no activations: the calibration data never reach this layer")
        return self.sums[path] / self.rows[path]


def tuples(batches: Iterable[Any]) -> Iterator[tuple]:
    """Yield the arguments of each call: a batch that is no tuple is one argument."""
    for batch in batches:
        yield batch if isinstance(batch, tuple) else (batch,)


def second_moments(
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
            call(*batch)
            count += 1
    if not count:
        raise ValueError("batches is empty: calibration needs at least one")
    for path, sums in moments.sums.items():
        if not jnp.isfinite(sums).all():
            raise ValueError(f"{path}: the activations of the calibration data hold NaN or inf")
    return moments
