"""Rows of a quantized table: the embedding lookup."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.placement import on_device, padded
from qjax.core.qtensor import QTensor
from qjax.core.scales import rows_of
from qjax.ops import trace
from qjax.ops.explicit import compiled, entries


def take(q: QTensor, ids: jax.Array, *, dtype=None) -> jax.Array:
    """Look up rows of a quantized table: `jnp.take(q.dequantize(), ids, axis=0)`.

    Only the rows that are asked for are decoded if the table was quantized along its features
    (`contract_axes=(1,)`, as embeddings are) in the rows layout; otherwise all of it is.

    Args:
        q: a table [V, D].
        ids: integers of any shape; negative ones count from the end, those outside give NaN.
        dtype: of the result; the table's own by default.

    Returns:
        [*ids.shape, D]. q gets no gradient.

    Raises:
        TypeError: ids are not integers or q is not a QTensor.
        ValueError: q is not of rank 2.

    Example:
        >>> q = qjax.quantize(jnp.ones((10, 64)), contract_axes=(1,))
        >>> qjax.take(q, jnp.array([1, 2])).shape
        (2, 64)
    """
    if not isinstance(q, QTensor):
        raise TypeError(f"q must be a QTensor, got {type(q).__name__}")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids must be integers, got {ids.dtype}")
    if q.ndim != 2 or q.batch_shape:
        raise ValueError(f"q must be a table [V, D], got {q!r}")
    dtype = q.dtype if dtype is None else dtype
    if q.layout != "rows" or q.contract_axes != (1,):
        trace.record("decode", "take: blocks do not run along the rows", q)
        rows = functools.partial(jnp.take, axis=0)
        table = jax.lax.stop_gradient(q.dequantize(dtype))
        return compiled(rows, (*entries(ids), entries(table)[1]), table, ids)
    trace.record("take", "rows decoded", q)
    columns = padded(q.sharding and q.sharding.spec, 2)[1]
    rows = functools.partial(_rows, dtype=dtype)
    return compiled(rows, (*entries(ids), columns), on_device(q), ids)


def _rows(q: QTensor, ids: jax.Array, dtype) -> jax.Array:
    rows = ids.reshape(-1).astype(jnp.int32)
    rows = jnp.where(rows < 0, rows + q.shape[0], rows)
    inside = (rows >= 0) & (rows < q.shape[0])
    rows = jnp.where(inside, rows, 0)
    some = dataclasses.replace(
        q,
        packed=q.packed[rows],
        scales=rows_of(q.scales, rows),
        slice_shape=(rows.size, q.shape[1]),
    )
    values = some.dequantize(dtype)
    values = jnp.where(inside[:, None], values, np.array(np.nan, dtype))
    return jax.lax.stop_gradient(values).reshape(*ids.shape, q.shape[1])
