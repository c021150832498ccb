"""The low-rank adapter beside a weight: y += scaling * (x A) B (LoRA, Hu et al. 2021).

For a weight with contract axes C and other axes O, A is [*batch, *C, rank] and B is
[*batch, rank, *O]: both keep the weight's own axes, so that they shard as it does.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import target
from qjax.ops.explicit import compiled, entries
from qjax.ops.matmul import parse

FEW_ROWS = 32  # up to here a product with B takes the time of a kernel, not of its bytes


def lora_matmul(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    batch_ndim: int = 0,
    sections: tuple[int, ...] | None = None,
    by_columns: bool = False,
) -> jax.Array:
    """Return (x A) B for x [*batch, ..., K]: [*batch, ..., *out], in x's dtype.

    Args:
        x: floating; K is the product of A's middle axes.
        a: [*batch, *contract, rank].
        b: [*batch, rank, *out].
        batch_ndim: number of batch axes.
        sections: of a layer that stands for several: see `block_diagonal`.
        by_columns: A is given transposed, [rank, K], and so is B, [N, rank], without batch axes: on
            a GPU x A of one row is then a kernel.
    """
    if by_columns:
        a, b = a.T, b.T
    batch, rank = a.shape[:batch_ndim], a.shape[-1]
    lead, out = x.shape[batch_ndim:-1], b.shape[batch_ndim + 1 :]
    rows = math.prod(lead)

    def product(x, a, b):
        x = x.reshape(*batch, rows, x.shape[-1])
        a = a.astype(x.dtype)
        # Products of 16-bit operands accumulate in float32; a float32 result would only be rounded.
        if by_columns and rows == 1:
            terms = x.astype(jnp.float32).T * a.astype(jnp.float32)
            hidden = jnp.sum(terms, axis=0, keepdims=True).astype(x.dtype)
        else:
            hidden = jnp.matmul(x, a.reshape(*batch, x.shape[-1], rank))
        if not batch and rows <= FEW_ROWS and target().is_cuda:
            y = few_rows(hidden, b.reshape(b.shape[0], -1), sections)
        else:
            b = block_diagonal(b, sections)
            y = jnp.matmul(hidden, b.reshape(*batch, -1, math.prod(out)).astype(x.dtype))
        return y.reshape(*batch, *lead, *out)

    return compiled(product, (*entries(x)[:-1], *entries(b)[batch_ndim + 1 :]), x, a, b)


def block_diagonal(b: jax.Array, sections: tuple[int, ...] | None) -> jax.Array:
    """Return B [..., rank, N] of several layers side by side as [..., sections * rank, N].

    Each layer has its own part of the hidden axis and of N: zero where they do not meet. None, for
    one layer, is B itself.

    Example:
        >>> block_diagonal(jnp.ones((1, 3)), (1, 2))
        Array([[1., 0., 0.],
               [0., 1., 1.]], dtype=float32)
    """
    if sections is None:
        return b
    count, rank = len(sections), b.shape[-2]
    owner = np.repeat(np.arange(count), sections)
    mine = np.repeat(np.arange(count), rank)[:, None] == owner[None, :]
    stacked = jnp.concatenate([b] * count, axis=-2)
    return jnp.where(mine.reshape((1,) * (b.ndim - 2) + mine.shape), stacked, 0)


def few_rows(hidden: jax.Array, b: jax.Array, sections: tuple[int, ...] | None) -> jax.Array:
    """Return hidden [M, sections * rank] times B [rank, N] as a sum written out over the rank.

    The compiler fuses it into whatever adds it up, where a product would be a kernel of its own:
    in decoding, the time of a kernel is mostly that it is one.
    """
    rank = b.shape[0]
    ends = np.cumsum(sections or (b.shape[1],))
    parts = []
    for i, (start, end) in enumerate(zip([0, *ends[:-1]], ends)):
        terms = (
            hidden[:, i * rank + r, None].astype(jnp.float32)
            * b[r, None, start:end].astype(hidden.dtype).astype(jnp.float32)
            for r in range(rank)
        )
        parts.append(functools.reduce(jnp.add, terms))
    return jnp.concatenate(parts, axis=-1).astype(hidden.dtype)


def lora_einsum(
    equation: str,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    contract_axes: tuple[int, ...],
    batch_ndim: int = 0,
) -> jax.Array:
    """Return what `equation` gives for x and the weight A B, without forming it.

    Args:
        equation: "x,w->out", as for the weight that A and B adapt.
        x: floating.
        a, b: the adapter.
        contract_axes: of the weight's slice, ascending.
        batch_ndim: the weight's batch axes.
    """
    w_ndim = a.ndim + b.ndim - 2 - batch_ndim
    x_axes, w_axes, out_axes = parse(equation, x.ndim, w_ndim)
    batch, slice_axes = w_axes[:batch_ndim], w_axes[batch_ndim:]
    contract = [slice_axes[i] for i in contract_axes]
    other = [axis for axis in slice_axes if axis not in contract]
    # Numbered axes: einsum's interleaved form has no limit of letters.
    number = {axis: i for i, axis in enumerate(dict.fromkeys([*x_axes, *w_axes, "rank"]))}
    factors = [(a, [*batch, *contract, "rank"]), (b, [*batch, "rank", *other])]
    if any(axis in x_axes for axis in other):  # transposed: B holds the summed axes
        factors.reverse()
    (left, left_axes), (right, right_axes) = factors
    # What the second product or the result still needs stays in x A.
    kept = [axis for axis in x_axes if axis not in left_axes or axis in (*right_axes, *out_axes)]
    hidden_axes = [*kept, *(axis for axis in left_axes if axis not in x_axes)]

    def product(x, x_axes, w, w_axes, out_axes):
        numbered = [[number[axis] for axis in axes] for axes in (x_axes, w_axes, out_axes)]
        shared = {*x_axes} & {*w_axes} & {*out_axes}
        # XLA's CPU product refuses bfloat16 unless the batch axes come first in its result.
        dtype = x.dtype if {*out_axes[: len(shared)]} == shared else jnp.float32
        args = (x.astype(dtype), numbered[0], w.astype(dtype), numbered[1], numbered[2])
        return jnp.einsum(*args, preferred_element_type=jnp.float32).astype(x.dtype)

    def both(x, left, right):
        hidden = product(x, x_axes, left, left_axes, hidden_axes)
        return product(hidden, hidden_axes, right, right_axes, out_axes)

    sharded: dict[str, Any] = {}
    for operand, axes in ((right, right_axes), (left, left_axes), (x, x_axes)):
        sharded |= zip(axes, entries(operand), strict=True)
    return compiled(both, [sharded[axis] for axis in out_axes], x, left, right)


def lora_take(ids: jax.Array, a: jax.Array, b: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Return rows of (A B)^T, the adapter of a table [V, D]: [*ids.shape, D] in `dtype`.

    Args:
        ids: integers of any shape; negative ones count from the end, those outside give NaN.
        a: [D, rank].
        b: [rank, V].
        dtype: of the product and the result.
    """

    def product(ids, a, b):
        columns = jnp.take(b, ids, axis=1).astype(dtype)  # [rank, *ids]
        rows = jnp.tensordot(columns, a.astype(dtype), (0, 1), preferred_element_type=jnp.float32)
        return rows.astype(dtype)

    return compiled(product, (*entries(ids), entries(a)[0]), ids, a, b)


def lora_weight(
    a: jax.Array, b: jax.Array, contract_axes: tuple[int, ...], batch_ndim: int = 0
) -> jax.Array:
    """Return A B as float32 of the weight's logical shape [*batch, *slice]."""
    batch, rank = a.shape[:batch_ndim], a.shape[-1]
    contract, out = a.shape[batch_ndim:-1], b.shape[batch_ndim + 1 :]
    other = [i for i in range(len(contract) + len(out)) if i not in contract_axes]
    order = np.argsort([*contract_axes, *other]) + batch_ndim
    order = (*range(batch_ndim), *order.tolist())

    def product(a, b):
        a = a.reshape(*batch, math.prod(contract), rank).astype(jnp.float32)
        b = b.reshape(*batch, rank, math.prod(out)).astype(jnp.float32)
        ordered = jnp.matmul(a, b, precision="highest").reshape(*batch, *contract, *out)
        return jnp.transpose(ordered, order)

    sharded = (*entries(a)[:-1], *entries(b)[batch_ndim + 1 :])
    return compiled(product, [sharded[i] for i in order], a, b)
