"""DoRA (Liu et al. 2024): an adapter that also learns the length of each column of the weight.

The weight becomes m * (W + s A B) / ||W + s A B||, with a norm and a magnitude m for each output.
The norm counts as a constant in the backward pass (section 4.3 of the paper), as in PEFT.
"""

import math

import jax
import jax.numpy as jnp

from qjax.core.qtensor import QTensor
from qjax.ops.lora import lora_weight
from qjax.ops.matmul import matmul, parse


def column_norms(
    w: QTensor | jax.Array,
    a: jax.Array,
    b: jax.Array,
    scaling: float,
    contract_axes: tuple[int, ...],
    batch_ndim: int = 0,
) -> jax.Array:
    """Return ||W + scaling A B|| over the contract axes, float32 [*batch, *out], with no gradient.

    The square is ||W||^2 + 2 s <A^T W, B> + s^2 <A^T A B, B> for each column, so a 4-bit W is
    multiplied packed by A's few columns, and neither W nor A B is formed.

    Args:
        w: [*batch, *slice].
        a: [*batch, *contract, rank].
        b: [*batch, rank, *out].
        scaling: s.
        contract_axes: of a slice.
        batch_ndim: leading axes of w that are not of a slice.
    """
    a, b = jax.lax.stop_gradient((a.astype(jnp.float32), b.astype(jnp.float32)))
    batch, rank, out = a.shape[:batch_ndim], a.shape[-1], b.shape[batch_ndim + 1 :]
    rows = jnp.swapaxes(a.reshape(*batch, -1, rank), -1, -2)  # A^T, [*batch, rank, K]
    columns = b.reshape(*batch, rank, -1)
    axes = tuple(batch_ndim + axis for axis in contract_axes)
    if isinstance(w, QTensor):
        cross = matmul(rows, w)
        w = jax.lax.stop_gradient(w.dequantize(jnp.float32))
    else:
        w = jax.lax.stop_gradient(w.astype(jnp.float32))
        kernel = jnp.moveaxis(w, axes, range(batch_ndim, batch_ndim + len(axes)))
        kernel = kernel.reshape(*batch, rows.shape[-1], math.prod(out))
        cross = jnp.matmul(rows, kernel, precision="highest")
    cross = cross.reshape(columns.shape)
    gram = jnp.matmul(rows, jnp.swapaxes(rows, -1, -2), precision="highest")
    update = jnp.matmul(gram, columns, precision="highest")
    added = ((2 * scaling * cross + scaling**2 * update) * columns).sum(axis=-2)
    square = jnp.sum(w * w, axis=axes) + added.reshape(*batch, *out)
    return jax.lax.stop_gradient(jnp.sqrt(square))


def dora_weight(
    w: jax.Array,
    a: jax.Array,
    b: jax.Array,
    magnitude: jax.Array,
    scaling: float,
    contract_axes: tuple[int, ...],
    batch_ndim: int = 0,
) -> jax.Array:
    """Return the merged weight, float32 of the shape of w [*batch, *slice]."""
    merged = w + scaling * lora_weight(a, b, contract_axes, batch_ndim)
    axes = tuple(batch_ndim + axis for axis in contract_axes)
    square = jnp.sum(merged * merged, axis=axes, keepdims=True)
    factor = jnp.expand_dims(magnitude.astype(jnp.float32), axes)
    return merged * (factor / jax.lax.stop_gradient(jnp.sqrt(square)))


def dora_output(
    base: jax.Array,
    dropped: jax.Array | None,
    update: jax.Array,
    factor: jax.Array,
    bias: jax.Array | None,
) -> jax.Array:
    """Return the layer's result, in float32.

    Args:
        base: x W + bias.
        dropped: drop(x) W + bias where dropout acts, else None: the magnitude scales what the
            adapter sees, and PEFT adds its change to the whole product.
        update: scaling * (drop(x) A) B.
        factor: magnitude over norm, shaped to broadcast.
        bias: shaped to broadcast, or None.
    """
    base, update = base.astype(jnp.float32), update.astype(jnp.float32)
    core = base if dropped is None else dropped.astype(jnp.float32)
    core = core if bias is None else core - bias.astype(jnp.float32)
    return base + (factor - 1) * core + factor * update


def spread(
    v: jax.Array, equation: str, x_ndim: int, contract_axes: tuple[int, ...], batch_ndim: int
) -> jax.Array:
    """Reshape a vector [*batch, *out] of a weight to broadcast against what "x,w->y" gives.

    Raises:
        NotImplementedError: the equation sums over other axes of the weight.
    """
    w_ndim = v.ndim + len(contract_axes)
    _, w_axes, out_axes = parse(equation, x_ndim, w_ndim)
    kept = [axis for i, axis in enumerate(w_axes) if i - batch_ndim not in contract_axes]
    if not set(kept) <= set(out_axes):
        raise NotImplementedError(f"DoRA where {equation!r} sums over other axes of the weight")
    sizes = dict(zip(kept, v.shape, strict=True))
    v = jnp.transpose(v, [kept.index(axis) for axis in out_axes if axis in kept])
    return v.reshape([sizes.get(axis, 1) for axis in out_axes])
