"""Products with 8-bit weights: the codes are widened in the dot, or met by 8-bit activations.

W = codes * absmax / largest code, with one absmax for each output, so the codes are multiplied as
they are and the scale is applied to the result.
"""

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.qtensor import QTensor
from qjax.core.scales import float_scales

_INT8 = np.float32(127)
_HALF = 65504  # the largest float16


def product(x: jax.Array, q: QTensor, transpose: bool) -> jax.Array:
    """Multiply x [M, K] by one slice: [M, N], in x's dtype; transposed, [M, N] to [M, K]."""
    codes = q.packed.reshape(-1, q.packed.shape[-1])
    step = float_scales(q.scales)[:, 0] * q.kind.unit
    if transpose:
        scaled = (x.astype(jnp.float32) * step[None]).astype(x.dtype)
        return _dot(scaled, codes.astype(x.dtype), 0).astype(x.dtype)
    if q.int8_threshold is not None:
        return _llm_int8(x, codes, step, q.int8_threshold).astype(x.dtype)
    return (_dot(x, codes.astype(x.dtype), 1) * step[None]).astype(x.dtype)


def _dot(x: jax.Array, w: jax.Array, axis: int, dtype=jnp.float32) -> jax.Array:
    return jax.lax.dot_general(x, w, (((1,), (axis,)), ((), ())), preferred_element_type=dtype)


def _llm_int8(x: jax.Array, codes: jax.Array, step: jax.Array, threshold: float) -> jax.Array:
    """Multiply as LLM.int8() (Dettmers et al. 2022, section 3), float32 [M, N].

    Columns of x that hold an outlier are multiplied in x's dtype, the others in 8 bits, with a
    scale for each row of x that leaves the outliers out. As in bitsandbytes, x of any dtype is
    rounded to float16 first.
    """
    # XLA on a GPU would leave out a rounding that is undone.
    half = jax.lax.optimization_barrier(jnp.clip(x, -_HALF, _HALF).astype(jnp.float16))
    outlier = jnp.abs(half) >= np.float16(threshold)
    column = outlier.any(axis=0)
    kept = jnp.where(outlier, 0, half.astype(jnp.float32))
    absmax = jnp.max(jnp.abs(kept), axis=1, keepdims=True)
    # Torch divides a number by an array in this way; it decides where a code is a tie.
    rounded = jnp.round(kept * jnp.where(absmax > 0, np.float32(1) / absmax * _INT8, 0))
    eighth = jnp.where(column[None], 0, rounded).astype(jnp.int8)
    sums = _dot(eighth, codes, 1, jnp.int32).astype(jnp.float32)
    y = sums * (absmax / _INT8) * step[None]

    def with_outliers(y):
        w = (codes.astype(jnp.float32) * step[:, None]).astype(x.dtype)
        return y + _dot(jnp.where(column[None], x, jnp.zeros_like(x)), w, 1)

    return jax.lax.cond(column.any(), with_outliers, lambda y: y, y)
