"""Rows sorted by expert times the experts' 4-bit weights."""

import functools
import math

import jax
import jax.numpy as jnp

from qjax.core.placement import padded
from qjax.core.qtensor import QTensor
from qjax.ops import trace
from qjax.ops.explicit import compiled, entries


def ragged_dot(x: jax.Array, q: QTensor, group_sizes: jax.Array) -> jax.Array:
    """Multiply groups of rows by a weight each: `jax.lax.ragged_dot(x, q.dequantize(), ...)`.

    The weights are decoded inside, forward and backward; what is kept for the gradient is packed.

    Args:
        x: floating [M, K], the rows of the first group first.
        q: [E, K, N], quantized along K with E as a batch axis (`batch_ndim=1`).
        group_sizes: integers [E], the number of rows of each; rows beyond their sum give zeros.

    Returns:
        x's dtype, [M, N]. q gets no gradient.

    Raises:
        TypeError: x is not floating or q is not a QTensor.
        ValueError: q is not [E, K, N] with E as its batch axis, or x does not fit.

    Example:
        >>> w = jnp.ones((2, 64, 8))
        >>> q = qjax.quantize(w, batch_ndim=1)
        >>> ragged_dot(jnp.ones((5, 64)), q, jnp.array([2, 3])).shape
        (5, 8)
    """
    if not isinstance(q, QTensor):
        raise TypeError(f"q must be a QTensor, got {type(q).__name__}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating, got {x.dtype}")
    if len(q.batch_shape) != 1 or q.contract_axes != (0,) or len(q.slice_shape) != 2:
        raise ValueError(f"q must be [E, K, N], quantized along K for each of E, got {q!r}")
    if x.ndim != 2 or x.shape[1] != math.prod(q.contract_shape):
        raise ValueError(f"x must be [M, {q.slice_shape[0]}], got shape {x.shape}")
    trace.record("ragged_dot", "decoded inside, for the product and for its gradient", q)
    return _product(x, q, group_sizes)


@jax.custom_vjp
def _product(x, q, group_sizes):
    out = q.sharding and padded(q.sharding.spec, q.ndim)[2]
    return compiled(_decoded, (entries(x)[0], out), x, q, group_sizes)


def _decoded(x, q, group_sizes, transpose=False):
    w = q.dequantize(x.dtype)
    w = jnp.swapaxes(w, 1, 2) if transpose else w
    y = jax.lax.ragged_dot(x, w, group_sizes, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def _forward(x, q, group_sizes):
    return _product(x, q, group_sizes), (q, group_sizes, entries(x))


def _backward(residuals, g):
    q, group_sizes, x_entries = residuals
    product = functools.partial(_decoded, transpose=True)
    return compiled(product, x_entries, g, q, group_sizes), None, None


_product.defvjp(_forward, _backward)
