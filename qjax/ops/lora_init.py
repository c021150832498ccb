"""Adapters that make up for quantization: LoftQ (Li et al. 2023) and PiSSA (Meng et al. 2024).

Both take the float weight W and give a base Q and an adapter with Q + scaling * A B closer to W
than a quantized W is. PiSSA puts the largest singular directions of W in the adapter and quantizes
the rest. LoftQ quantizes what the adapter leaves, fits the adapter to what that lost, and repeats.
"""

import functools
import math

import jax
import jax.numpy as jnp

from qjax.core.blockwise import quantize_like
from qjax.core.qtensor import QTensor
from qjax.ops.lora import lora_weight

_OVERSAMPLE, _POWER_ITERATIONS = 16, 4  # within 1 % of the best, on noise too

Init = tuple[QTensor | jax.Array, jax.Array, jax.Array]


def pissa(
    w: jax.Array,
    base: QTensor | jax.Array,
    rank: int,
    scaling: float,
    contract_axes: tuple[int, ...],
    batch_ndim: int,
    key: jax.Array,
) -> Init:
    """Return the base that is left, A and B.

    Args:
        w: float weight [*batch, *slice].
        base: the layer's weight, whose format (of a float one, the dtype) the new base takes.
        rank: of the adapter.
        scaling: its factor.
        contract_axes: of a slice.
        batch_ndim: leading axes that are not of a slice.
        key: for the start of the subspace iteration.
    """
    w = w.astype(jnp.float32)
    a, b = _fit(w, rank, scaling, contract_axes, batch_ndim, key)
    left = w - scaling * lora_weight(a, b, contract_axes, batch_ndim)
    return _like(left, base), a, b


def loftq(
    w: jax.Array,
    base: QTensor,
    rank: int,
    scaling: float,
    contract_axes: tuple[int, ...],
    batch_ndim: int,
    key: jax.Array,
    iterations: int,
) -> Init:
    """Return the base, A and B after some iterations; arguments as `pissa`'s."""
    w = w.astype(jnp.float32)
    where = contract_axes, batch_ndim
    q = quantize_like(w, base)
    a, b = _fit(w - q.dequantize(jnp.float32), rank, scaling, *where, key)
    for _ in range(iterations - 1):
        q = quantize_like(w - scaling * lora_weight(a, b, *where), base)
        a, b = _fit(w - q.dequantize(jnp.float32), rank, scaling, *where, key)
    return q, a, b


def _like(w: jax.Array, base: QTensor | jax.Array) -> QTensor | jax.Array:
    return quantize_like(w, base) if isinstance(base, QTensor) else w.astype(base.dtype)


def _fit(w, rank, scaling, contract_axes, batch_ndim, key) -> tuple[jax.Array, jax.Array]:
    """Return A [*batch, *contract, rank] and B [*batch, rank, *out] with scaling * A B near w."""
    batch, shape = w.shape[:batch_ndim], w.shape[batch_ndim:]
    other = [i for i in range(len(shape)) if i not in contract_axes]
    order = [*range(batch_ndim), *(batch_ndim + i for i in (*contract_axes, *other))]
    contract, out = [shape[i] for i in contract_axes], [shape[i] for i in other]
    matrix = jnp.transpose(w, order).reshape(*batch, math.prod(contract), math.prod(out))
    if rank > min(matrix.shape[-2:]):
        raise ValueError(f"rank={rank} is more than a weight of {list(matrix.shape[-2:])} has")
    left, right = low_rank(matrix / scaling, rank, key)
    return left.reshape(*batch, *contract, rank), right.reshape(*batch, rank, *out)


@functools.partial(jax.jit, static_argnums=1)
def low_rank(w: jax.Array, rank: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return L [*batch, K, rank] and R [*batch, rank, N], L R nearly the best such for w.

    By subspace iteration (Halko et al. 2011): products with a few columns where a whole SVD of a
    large weight takes minutes.

    Args:
        w: float32 [*batch, K, N].
        rank: at most K and N.
        key: for the first subspace.
    """
    width = min(rank + _OVERSAMPLE, *w.shape[-2:])
    wt = jnp.swapaxes(w, -1, -2)
    multiply = lambda x, y: jnp.matmul(x, y, precision="highest")  # noqa: E731
    basis = jax.random.normal(key, (*w.shape[:-2], w.shape[-1], width), w.dtype)
    for _ in range(_POWER_ITERATIONS):
        basis = jnp.linalg.qr(multiply(wt, multiply(w, basis)))[0]
    basis = jnp.linalg.qr(multiply(w, basis))[0]
    u, s, vt = jnp.linalg.svd(multiply(jnp.swapaxes(basis, -1, -2), w), full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    left = multiply(basis, u[..., :rank]) * root[..., None, :]
    return left, root[..., None] * vt[..., :rank, :]
