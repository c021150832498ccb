"""Products with a QTensor: matmul and einsum, decoded inside the op, forward and backward.

The residual of the backward pass is the packed weight itself: x is not needed, since a QTensor has
no gradient, and nothing decoded is kept.
"""

import dataclasses
import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import pallas_kernels
from qjax.core.double_quant import DoubleQuant, dynamic_table
from qjax.core.placement import explicit_mesh, on_device, place, sharding_of
from qjax.core.qslice import QSlice, taken
from qjax.core.qtensor import QTensor
from qjax.core.scales import AffineScales, float_scales, kernel_scales
from qjax.ops import eight_bit, explicit, trace
from qjax.ops.partition import local_product, product


def matmul(x: jax.Array, q: QTensor | QSlice, *, implementation: str | None = None) -> jax.Array:
    """Multiply x by a quantized weight: `x @ q.dequantize(x.dtype)`, accumulated in float32.

    Args:
        x: floating [*batch, ..., K], where K is the product of q's contract axes and `batch` are
            q's batch axes, if it has any.
        q: the weight, or one slice of a stack of weights, read where it is.
        implementation: None for the fastest that can run; "xla", "mosaic_gpu" or "triton".

    Returns:
        x's dtype, [*batch, ..., *out], with the sizes of q's other axes. q gets no gradient.

    Raises:
        ValueError: the shapes do not contract, or the implementation is unknown.
        TypeError: x is not floating or q is not a QTensor.
        NotImplementedError: the named implementation cannot run.

    Example:
        >>> q = qjax.quantize(jnp.ones((64, 8)))
        >>> qjax.matmul(jnp.ones((2, 64)), q).shape
        (2, 8)
    """
    _check_operands(x, q)
    if isinstance(q, QSlice) and _reads_in_place(q):
        return _slice_matmul(x, q, implementation)
    q = taken(q)
    _check_rows(x, q)
    rows = math.prod(x.shape[len(q.batch_shape) : -1])
    _record("matmul", rows, x.dtype, q, False, implementation)
    return _product(x.reshape(*x.shape[:-1], *q.contract_shape), q, False, implementation)


def _check_rows(x: jax.Array, q: QTensor, batch_ndim: int | None = None) -> None:
    """Raise unless x ends in what one slice of q contracts; `batch_ndim` axes of q count."""
    batch = q.batch_shape[:batch_ndim]
    k = math.prod(q.contract_shape)
    fits = x.ndim > len(batch) and x.shape[: len(batch)] == batch and x.shape[-1] == k
    if not fits:
        expected = [*batch, "...", k]
        raise ValueError(f"x must be {expected} to multiply a {q!r}, got shape {x.shape}")


def _reads_in_place(q: QTensor | QSlice) -> bool:
    """Whether the kernels read its arrays as they are: plain rows, on one device."""
    stack, batch_ndim = (q.stack, 1) if isinstance(q, QSlice) else (q, 0)
    plain = stack.kind.bits == 4 and not isinstance(stack.scales, AffineScales)
    rows = stack.layout == "rows" and len(stack.batch_shape) == batch_ndim
    near = jax.typeof(stack.packed).memory_space != jax.memory.Space.Host
    return plain and rows and near and jax.device_count() == 1


def _slice_matmul(x: jax.Array, q: QSlice, implementation) -> jax.Array:
    stack, lead = q.stack, x.shape[:-1]
    _check_rows(x, stack, 0)
    _record("matmul", math.prod(lead), x.dtype, stack, False, implementation)
    x = x.reshape(-1, x.shape[-1])
    trace.observe(x, stack, batch_ndim=0)
    return _contract(x, q, False, implementation, None).reshape(*lead, *stack.out_shape)


def kernel_weight(q: QTensor | QSlice) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return (packed, scales, codebook) and options for the kernels, or None for other weights."""
    return _kernel_weight(q) if _reads_in_place(q) else None


def _kernel_weight(q: QTensor | QSlice) -> tuple[tuple[Any, ...], dict[str, Any]]:
    stack, layer = (q.stack, q.index) if isinstance(q, QSlice) else (q, None)
    lead = stack.packed.shape[: 0 if layer is None else 1]
    packed = stack.packed.reshape(*lead, -1, stack.packed.shape[-1])
    arrays = packed, kernel_scales(stack.scales, len(lead)), jnp.asarray(stack.codebook)
    return arrays, {"block_size": stack.block_size, "layer": layer}


def einsum(
    equation: str, x: jax.Array, q: QTensor | QSlice, *, implementation: str | None = None
) -> jax.Array:
    """Contract x with a quantized weight: `jnp.einsum(equation, x, q.dequantize(x.dtype))`.

    An equation that sums over exactly q's contract axes (or exactly over its other axes: the
    transposed product) runs the matmul kernels. Any other decodes the weight, and warns once.

    Args:
        equation: such as "btd,dnh->btnh"; x and the result may have "...".
        x: floating.
        q: the weight, second operand.
        implementation: as in `matmul`.

    Returns:
        x's dtype. q gets no gradient.

    Raises:
        ValueError: the equation is malformed or its sizes do not fit.
        TypeError: x is not floating or q is not a QTensor.

    Example:
        >>> q = qjax.quantize(jnp.ones((64, 2, 4)), contract_axes=(0,))
        >>> qjax.einsum("btd,dnh->btnh", jnp.ones((1, 3, 64)), q).shape
        (1, 3, 2, 4)
    """
    _check_operands(x, q)
    q = taken(q)
    x_axes, q_axes, out_axes = parse(equation, x.ndim, q.ndim)
    sizes = dict(zip(q_axes, q.shape, strict=True))
    for axis, size in zip(x_axes, x.shape, strict=True):
        if sizes.setdefault(axis, size) != size:
            raise ValueError(
                f"{equation!r}: axis {axis!r} is {size} in x {x.shape} and {sizes[axis]} in {q!r}"
            )
    batch_ndim = len(q.batch_shape)
    batch, slice_axes = q_axes[:batch_ndim], q_axes[batch_ndim:]
    contract = [slice_axes[i] for i in q.contract_axes]
    other = [slice_axes[i] for i in q.out_axes]
    spread = [a for a in batch if a not in x_axes]  # one x for all experts
    x = jnp.broadcast_to(x, (*(sizes[a] for a in spread), *x.shape))
    x_axes = [*spread, *x_axes]
    transpose = _sums_over(contract, other, x_axes, out_axes)
    rows = [a for a in x_axes if a not in q_axes]
    shared = set(batch) <= set(x_axes) & set(out_axes) and set(rows) <= set(out_axes)
    if transpose is None or not shared:
        trace.record("decode", f"einsum {equation!r} sums over other axes", q)
        _warn_decoded(equation, q.contract_axes)
        w = jax.lax.stop_gradient(q.dequantize(x.dtype))
        x = x[(0,) * len(spread)]
        return jnp.einsum(equation, x, w, preferred_element_type=jnp.float32).astype(x.dtype)
    summed, kept = (other, contract) if transpose else (contract, other)
    x = jnp.transpose(x, [x_axes.index(a) for a in (*batch, *rows, *summed)])
    rows_count = math.prod(sizes[a] for a in rows)
    _record("einsum", rows_count, x.dtype, q, transpose, implementation)
    y = _product(x, q, transpose, implementation)
    y_axes = [*batch, *rows, *kept]
    return jnp.transpose(y, [y_axes.index(a) for a in out_axes])


def parse(equation: str, x_ndim: int, q_ndim: int) -> tuple[list[str], list[str], list[str]]:
    """Split "x,q->out" into axis names, an ellipsis of x and out written out as "0", "1", ...

    Raises:
        ValueError: not of this form, a repeated axis, an ellipsis in q, or ranks that do not fit.
    """
    terms = equation.replace(" ", "").replace("->", ",").split(",")
    if len(terms) != 3 or "->" not in equation:
        raise ValueError(f"equation must be 'x,q->out', got {equation!r}")
    hidden = x_ndim - len(terms[0].replace("...", ""))
    dots = [str(i) for i in range(hidden)] if "..." in terms[0] else []
    result = []
    for term in terms:
        before, ellipsis, after = term.partition("...")
        axes = [*before, *(dots if ellipsis else []), *after]
        if len(set(axes)) != len(axes) or not all(a.isalnum() for a in axes):
            raise ValueError(f"{equation!r}: {term!r} must name each axis once, by a letter")
        result.append(axes)
    x_axes, q_axes, out_axes = result
    if "..." in terms[1] or hidden < 0 or (len(x_axes), len(q_axes)) != (x_ndim, q_ndim):
        raise ValueError(f"{equation!r} does not fit operands of rank {x_ndim} and {q_ndim}")
    unknown = sorted(set(out_axes) - set(x_axes) - set(q_axes))
    if unknown:
        raise ValueError(f"{equation!r}: result axes {unknown} are in no operand")
    return x_axes, q_axes, out_axes


def _sums_over(contract, other, x_axes, out_axes) -> bool | None:
    """Return False for a sum over exactly the contract axes, True for the others, else None."""
    for transpose, (summed, kept) in enumerate([(contract, other), (other, contract)]):
        summed_only = all(a in x_axes and a not in out_axes for a in summed)
        kept_only = all(a in out_axes and a not in x_axes for a in kept)
        if summed_only and kept_only:
            return bool(transpose)
    return None


@functools.cache
def _warn_decoded(equation: str, contract_axes: tuple[int, ...]) -> None:
    warnings.warn(
        f"einsum {equation!r} does not sum over the axes {contract_axes} along which the weight "
        "was quantized; it decodes the whole weight",
        stacklevel=3,
    )


def _check_operands(x, q) -> None:
    if not isinstance(q, QTensor | QSlice):
        raise TypeError(f"q must be a QTensor, got {type(q).__name__}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating, got {x.dtype}")


def _record(op, rows, dtype, q: QTensor, transpose, implementation) -> None:
    if not trace.is_recording():
        return
    if q.layout == "flat":
        trace.record("decode", f"{op} in the flat layout", q)
        return
    if q.kind.bits == 8:
        trace.record(op, "xla, in 8 bits" if q.int8_threshold else "xla, codes widened", q)
        return
    out, k = math.prod(q.out_shape), math.prod(q.contract_shape)
    batch_ndim = len(q.batch_shape)

    def one_slice(leaf):
        return jax.ShapeDtypeStruct(leaf.shape[batch_ndim:], leaf.dtype)

    packed = jax.ShapeDtypeStruct((out, k // 2), q.packed.dtype)
    scales = jax.eval_shape(kernel_scales, jax.tree.map(one_slice, q.scales))
    choice = pallas_kernels.resolve(
        "matmul",
        implementation,
        jax.ShapeDtypeStruct((rows, out if transpose else k), dtype),
        packed,
        scales,
        jax.ShapeDtypeStruct((16,), jnp.float32),
        block_size=q.block_size,
        transpose=transpose,
    )
    trace.record(op, choice.implementation, q)


def _product(x, q, transpose, implementation):
    """Multiply [*batch, *rows, *summed] by q, or transposed: [*batch, *rows, *kept]."""
    if not transpose:
        trace.observe(x, q)
    mesh = explicit_mesh(x, q.packed)
    if mesh is None:
        return _contract(x, q, transpose, implementation, None)
    if sharding_of(x) is None:
        x = place(x, NamedSharding(mesh, PartitionSpec()))
    return _contract(x, q, transpose, implementation, sharding_of(x))


# Conventions of the VJP: x [M, K], q decodes to W [N, K], y = x W^T [M, N], and g = dL/dy.
# dL/dx = g W: the same product transposed, from the same packed bytes. There is no dL/dW.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _contract(x, q, transpose, implementation, sharding):
    if isinstance(q, QSlice):
        arrays, how = _kernel_weight(q)
        how |= {"transpose": transpose, "implementation": implementation}
        return pallas_kernels.matmul(x, *arrays, **how)
    q = on_device(q)

    def flat(x, q, shard=None):
        summed, kept = q.contract_shape, q.out_shape
        if transpose:
            summed, kept = kept, summed
        rows = x.shape[len(q.batch_shape) : x.ndim - len(summed)]
        multiply = _slice_product
        for _ in q.batch_shape:
            multiply = jax.vmap(multiply, in_axes=(0, 0, None, None, None))
        x = x.reshape(*q.batch_shape, math.prod(rows), math.prod(summed))
        y = multiply(x, q, transpose, implementation, shard)
        return y.reshape(*q.batch_shape, *rows, *kept)

    if sharding is None:
        return flat(x, q)
    return explicit.product(x, q, transpose, flat)


def _contract_fwd(x, q, transpose, implementation, sharding):
    return _contract(x, q, transpose, implementation, sharding), q


def _contract_bwd(transpose, implementation, sharding, q, g):
    # Gradients are multiplied by the weight as it is: LLM.int8() has 8-bit activations only.
    if isinstance(q, QTensor):  # a QSlice has 4 bits
        q = dataclasses.replace(q, int8_threshold=None)
    dx = _contract(g, q, not transpose, implementation, sharding)
    return dx if sharding is None else place(dx, sharding), None


_contract.defvjp(_contract_fwd, _contract_bwd)


def _slice_product(x, q, transpose, implementation, shard):
    """Multiply x [M, K] by one slice: [M, N]; or transposed, [M, N]: [M, K]."""
    if q.layout == "flat":
        rows = q.dequantize(x.dtype).transpose(*q.out_axes, *q.contract_axes)
        w = rows.reshape(math.prod(q.out_shape), math.prod(q.contract_shape))
        contract = ((1,), (0 if transpose else 1,))
        y = jax.lax.dot_general(x, w, (contract, ((), ())), preferred_element_type=jnp.float32)
        return y.astype(x.dtype)
    if q.kind.bits == 8:
        return eight_bit.product(x, q, transpose)
    second = ()
    if isinstance(q.scales, DoubleQuant):
        second = (q.scales.absmax, q.scales.offset, jnp.asarray(dynamic_table()))
        scales = q.scales.codes.reshape(-1, q.scales.codes.shape[-1])
    else:
        scales = kernel_scales(q.scales)
    packed = q.packed.reshape(-1, q.packed.shape[-1])
    operands = x, packed, scales, jnp.asarray(q.codebook), *second
    if shard is None:
        y = product(q.block_size, transpose, implementation)(*operands)
    else:
        local = local_product(q.block_size, transpose, implementation)
        y = local(*operands, origin=shard.origin(scales), pitch=shard.pitch)
    if isinstance(q.scales, AffineScales):
        y = y + _offset_product(x, q.scales, q.block_size, transpose)
    return y if shard is None else shard.add_up(y)


def _offset_product(x, scales: AffineScales, block_size: int, transpose: bool):
    """Multiply by what the zero points add to W: one number for each block."""
    offsets = float_scales(scales.offsets())  # [N, K / block_size]
    wide = x.astype(jnp.float32)
    if transpose:
        return jnp.repeat(wide @ offsets, block_size, axis=1).astype(x.dtype)
    blocks = wide.reshape(x.shape[0], -1, block_size).sum(axis=-1)
    return (blocks @ offsets.T).astype(x.dtype)
