"""Scales that make the error of a block small, found without gradients.

Absmax scales represent the largest weight of a block exactly. A smaller scale clips it and
represents the others better.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lookup import lookup
from pallas_kernels.quantize.reference import encode

_RATIOS = np.linspace(0.7, 1.1, 33, dtype=np.float32)
_ROUNDS = 20
_NORM, _BETA, _GROWTH = 0.7, 10.0, 1.01


def nearest(values: jax.Array, scale: jax.Array, table: np.ndarray) -> jax.Array:
    """Return the uint8 codes whose entry times `scale` is nearest to the values."""
    inverse = jnp.where(scale > 0, np.float32(1) / scale, 0)
    return encode(values * inverse, table)


def squared_error(
    rows: jax.Array, table: np.ndarray, block_size: int, importance: jax.Array | None = None
) -> jax.Array:
    """Return the multiple of each block's absmax with the least sum of squared errors.

    Args:
        rows: float32 [N, K].
        table: the 16 values.
        block_size: divides K.
        importance: float32 [K], the weight of each column's error, such as the mean square of the
            activations that multiply it (the observation of AWQ, Lin et al. 2023, section 3.1).

    Returns:
        float32 [N, K / block_size].
    """
    blocks = rows.reshape(rows.shape[0], -1, block_size)
    weights = jnp.ones(rows.shape[1]) if importance is None else importance
    weights = weights.reshape(1, -1, block_size)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)

    def better(best, ratio):
        scale = absmax * ratio
        decoded = lookup(table, nearest(blocks, scale[..., None], table)) * scale[..., None]
        error = jnp.sum(weights * (blocks - decoded) ** 2, axis=-1)
        improves = error < best[0]
        return (jnp.where(improves, error, best[0]), jnp.where(improves, scale, best[1])), None

    start = jnp.full(absmax.shape, np.inf, jnp.float32), absmax
    return jax.lax.scan(better, start, jnp.asarray(_RATIOS))[0][1]


def half_quadratic(rows: jax.Array, table: np.ndarray, block_size: int) -> jax.Array:
    """Return scales that let a few weights err so that the others do not (HQQ).

    Alternates the codes, the sparse part of the error (the proximal step of its 0.7-norm) and the
    scale that fits the rest by least squares. HQQ (Badri and Shaji 2023) fits zero points so; the
    tables here have none, and the scale takes their part.

    Args and returns: as `squared_error`.
    """
    blocks = rows.reshape(rows.shape[0], -1, block_size)
    absmax = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    unit = blocks * jnp.where(absmax > 0, np.float32(1) / absmax, 0)

    def improve(i, scale):
        values = lookup(table, nearest(unit, scale, table))
        error = unit - values * scale
        size = jnp.abs(error)
        threshold = jnp.where(size > 0, size, 1) ** (_NORM - 1) / (_BETA * _GROWTH**i)
        outlier = jnp.sign(error) * jnp.maximum(size - threshold, 0)
        norm = jnp.sum(values**2, axis=-1, keepdims=True)
        fitted = jnp.sum(values * (unit - outlier), axis=-1, keepdims=True) / norm
        return jnp.where(norm > 0, fitted, scale)

    scale = jax.lax.fori_loop(0, _ROUNDS, improve, jnp.ones_like(absmax))
    return (scale * absmax)[..., 0]
