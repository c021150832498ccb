"""GPTQ (Frantar et al. 2022): each column's error is made up for by the columns after it."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lookup import lookup
from qjax.calibration.search import nearest


def gptq_codes(
    rows: jax.Array,
    scales: jax.Array,
    moments: jax.Array,
    table: np.ndarray,
    damping: float,
) -> jax.Array:
    """Return codes that keep `rows @ x` for the x that are met, not each weight.

    Args:
        rows: float32 [N, K].
        scales: float32 [N, K / block_size], chosen beforehand.
        moments: float32 [K, K], the mean of x x^T.
        table: the 16 values.
        damping: added to the diagonal of `moments`, times its mean.

    Returns:
        uint8 [N, K].

    Source: algorithm 1 there, column by column, with scales that do not change on the way.
    """
    k = rows.shape[1]
    block_size = k // scales.shape[1]
    diagonal = jnp.diagonal(moments)
    # A column that is always zero may hold any weight: its own, by a moment of its own.
    moments = moments + jnp.diag(jnp.where(diagonal > 0, damping * diagonal.mean(), 1.0))
    factor = jax.scipy.linalg.cho_factor(moments)
    inverse = jax.scipy.linalg.cho_solve(factor, jnp.eye(k))
    upper = jnp.linalg.cholesky(inverse, upper=True)

    def column(carry, i):
        left = carry
        w, scale = left[:, i], scales[:, i // block_size]
        code = nearest(w, scale, table)
        error = (w - lookup(table, code) * scale) / upper[i, i]
        return left - error[:, None] * upper[i][None], code

    _, codes = jax.lax.scan(column, rows, jnp.arange(k))
    return codes.T
