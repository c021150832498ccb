"""What it costs to quantize a merged weight again."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qjax.core.qtensor import QTensor


class MergeError(NamedTuple):
    """The rounding of one weight, W' in 4 bits against W' itself, by Frobenius norms.

    Attributes:
        weight: relative to W'.
        update: relative to W' - W, what the adapter added: above 1, rounding outweighs learning.
    """

    weight: float
    update: float


def merge_error(old: QTensor, merged: jax.Array, new: QTensor) -> MergeError:
    """Compare W' [*batch, *slice], float32, with the old and the new 4-bit weight."""
    error = jnp.linalg.norm((new.dequantize(jnp.float32) - merged).ravel())
    update = jnp.linalg.norm((merged - old.dequantize(jnp.float32)).ravel())
    tiny = jnp.finfo(jnp.float32).tiny
    weight = jnp.maximum(jnp.linalg.norm(merged.ravel()), tiny)
    return MergeError(float(error / weight), float(error / jnp.maximum(update, tiny)))
