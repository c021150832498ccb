"""The low-rank adapter beside a weight: y += scaling * (x A) B (LoRA, Hu et al. 2021).

For a weight with contract axes C and other axes O, A is [*batch, *C, rank] and B is
[*batch, rank, *O]: both keep the weight's own axes, so that they shard as it does.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from qjax.ops.matmul import parse


def lora_matmul(x: jax.Array, a: jax.Array, b: jax.Array, batch_ndim: int = 0) -> jax.Array:
    """Return (x A) B for x [*batch, ..., K]: [*batch, ..., *out], in x's dtype.

    Args:
        x: floating; K is the product of A's middle axes.
        a: [*batch, *contract, rank].
        b: [*batch, rank, *out].
        batch_ndim: number of batch axes.
    """
    batch, rank = a.shape[:batch_ndim], a.shape[-1]
    lead, out = x.shape[batch_ndim:-1], b.shape[batch_ndim + 1 :]
    hidden = jnp.matmul(
        x.reshape(*batch, math.prod(lead), x.shape[-1]),
        a.reshape(*batch, x.shape[-1], rank).astype(x.dtype),
        preferred_element_type=jnp.float32,
    )
    y = jnp.matmul(
        hidden.astype(x.dtype),
        b.reshape(*batch, rank, math.prod(out)).astype(x.dtype),
        preferred_element_type=jnp.float32,
    )
    return y.astype(x.dtype).reshape(*batch, *lead, *out)


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
    numbers = lambda axes: [number[axis] for axis in axes]  # noqa: E731
    first, first_axes = (a, [*batch, *contract, "rank"]), (b, [*batch, "rank", *other])
    # The factor that shares summed axes with x comes first; both orders are exact.
    factors = [(first[0], first[1]), first_axes]
    if any(axis in x_axes for axis in other):
        factors.reverse()
    (left, left_axes), (right, right_axes) = factors
    hidden_axes = [x for x in x_axes if x not in left_axes or x in out_axes] + ["rank"]
    hidden_axes += [x for x in left_axes if x not in x_axes and x != "rank"]
    hidden = jnp.einsum(
        x,
        numbers(x_axes),
        left.astype(x.dtype),
        numbers(left_axes),
        numbers(hidden_axes),
        preferred_element_type=jnp.float32,
    ).astype(x.dtype)
    y = jnp.einsum(
        hidden,
        numbers(hidden_axes),
        right.astype(x.dtype),
        numbers(right_axes),
        numbers(out_axes),
        preferred_element_type=jnp.float32,
    )
    return y.astype(x.dtype)


def lora_weight(
    a: jax.Array, b: jax.Array, contract_axes: tuple[int, ...], batch_ndim: int = 0
) -> jax.Array:
    """Return A B as float32 of the weight's logical shape [*batch, *slice]."""
    batch, rank = a.shape[:batch_ndim], a.shape[-1]
    contract, out = a.shape[batch_ndim:-1], b.shape[batch_ndim + 1 :]
    a = a.reshape(*batch, math.prod(contract), rank).astype(jnp.float32)
    b = b.reshape(*batch, rank, math.prod(out)).astype(jnp.float32)
    product = jnp.matmul(a, b, precision="highest").reshape(*batch, *contract, *out)
    other = [i for i in range(len(contract) + len(out)) if i not in contract_axes]
    order = np.argsort([*contract_axes, *other]) + batch_ndim
    return jnp.transpose(product, (*range(batch_ndim), *order))
