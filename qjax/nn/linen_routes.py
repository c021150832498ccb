"""What each dense layer of Flax does with its kernel, and how to do the same with a QuantBox.

A `Route` belongs to one method of a layer class. It says which axes of the kernel the method sums
over, for quantization, and repeats the method on the packed weight. The layers of `qjax.linen` call
it on themselves; `qjax.apply` puts it in place of Flax's own method.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import errors
from flax.core import meta

from qjax.core.placement import like
from qjax.nn.linen_box import QuantBox
from qjax.ops import trace
from qjax.ops.dora import dora_output, spread
from qjax.ops.lora import lora_einsum, lora_matmul, lora_take
from qjax.ops.matmul import einsum, matmul, parse
from qjax.ops.take import take


class Kernel(NamedTuple):
    """A kernel as the method that reads it sees it: [*batch, *slice]."""

    shape: tuple[int, ...]
    contract_axes: tuple[int, ...]
    batch_ndim: int = 0


@dataclasses.dataclass(frozen=True)
class Route:
    """How one method of a layer uses its kernel.

    Attributes:
        param: name of the kernel.
        kernel: (module, *args) -> Kernel; None where no axis is summed over.
        call: (module, box, *args) -> what the method returns.
        decodes: whether Flax's own method has to run where the box was quantized along other axes.
        transposes: whether a sum over exactly the axes that were not contracted is no other.
    """

    param: str
    kernel: Callable[..., Kernel | None]
    call: Callable[..., jax.Array]
    decodes: bool = True
    transposes: bool = False


_deterministic = contextvars.ContextVar[bool | None]("deterministic", default=None)


@contextlib.contextmanager
def adapter_dropout(deterministic: bool | None) -> Iterator[None]:
    """Say whether adapters drop out in layers called inside; None: if there is an rng for it."""
    token = _deterministic.set(deterministic)
    try:
        yield
    finally:
        _deterministic.reset(token)


def fused_call(route: Route, module: nn.Module, *args, **kwargs) -> Any:
    """Run the route, or return NotImplemented where Flax's own method has to.

    That is where the kernel is in floating point, and where the layer has a `dot_general` of its
    own or sums over other axes than the kernel was quantized along: then Flax gets the decoded
    kernel, and a warning says so once.

    Raises:
        ScopeParamShapeError: the box holds a kernel of another shape.
    """
    if not has_box(module, route.param):
        return NotImplemented
    box = module.get_variable("params", route.param).without_lead()
    kernel = route.kernel(module, *args, **kwargs)
    path = path_of(module, route.param)
    if kernel is not None and kernel.shape != box.q.shape:
        raise errors.ScopeParamShapeError(
            route.param, path_of(module), tuple(box.q.shape), kernel.shape
        )
    reason = _why_decoded(route, module, box, kernel) if route.decodes else None
    with trace.leaf(path):
        if reason is None:
            return route.call(module, box, *args, **kwargs)
        trace.record("decode", reason)
    _warn_decoded(path, reason)
    return NotImplemented


def has_box(module: nn.Module, param: str) -> bool:
    """Return whether the module's parameter is a 4-bit kernel."""
    if not module.has_variable("params", param):
        return False
    return isinstance(module.get_variable("params", param), QuantBox)


def path_of(module: nn.Module, *names: str) -> str:
    """Return the "/"-joined path of a bound module, or of something in it."""
    return "/".join((*module.path, *names))


def _why_decoded(
    route: Route, module: nn.Module, box: QuantBox, kernel: Kernel | None
) -> str | None:
    """Return why the route cannot run, or None if it can."""
    axes = (box.q.contract_axes, box.q.out_axes) if route.transposes else (box.q.contract_axes,)
    if getattr(module, "dot_general", None) or getattr(module, "dot_general_cls", None):
        return "the layer has a dot_general of its own"
    batch_ndim = len(box.q.batch_shape)
    if kernel is None or kernel.contract_axes not in axes or kernel.batch_ndim != batch_ndim:
        return f"the layer does not sum over its axes {box.q.contract_axes} alone"
    return None


@functools.cache
def _warn_decoded(path: str, reason: str) -> None:
    warnings.warn(f"{path} is decoded for its product: {reason}", stacklevel=4)


def _dense_kernel(module: nn.Dense, inputs: jax.Array) -> Kernel:
    return Kernel((jnp.shape(inputs)[-1], module.features), (0,))


def _dense(module: nn.Dense, box: QuantBox, inputs: jax.Array) -> jax.Array:
    y, bias = _product(module, box, inputs, "bias" if module.use_bias else None)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def _general_axes(module: nn.DenseGeneral, inputs) -> tuple[tuple, tuple, tuple]:
    features, axis, batch = (
        (value,) if isinstance(value, int) else tuple(value)
        for value in (module.features, module.axis, module.batch_dims)
    )
    return features, tuple(sorted(i % inputs.ndim for i in axis)), tuple(sorted(batch))


def _general_kernel(module: nn.DenseGeneral, inputs: jax.Array) -> Kernel:
    features, axis, batch = _general_axes(module, inputs)
    shape = tuple(inputs.shape[i] for i in (*batch, *axis)) + features
    return Kernel(shape, tuple(range(len(axis))), len(batch))


def _dense_general(module: nn.DenseGeneral, box: QuantBox, inputs: jax.Array) -> jax.Array:
    features, axis, batch = _general_axes(module, inputs)
    rest = [i for i in range(inputs.ndim) if i not in axis]  # batch axes lead, Flax checks that
    x = jnp.transpose(inputs, (*rest, *axis))
    x = x.reshape(*x.shape[: len(rest)], math.prod(x.shape[len(rest) :]))
    y, bias = _product(module, box, x, "bias" if module.use_bias else None)
    if bias is None:
        return y
    lead = tuple(inputs.shape[i] if i in batch else 1 for i in rest)
    return y + bias.reshape(lead + features)


def _einsum_equation(module: nn.Einsum, einsum_str: str | None) -> str:
    return nn.merge_param("einsum_str", module.einsum_str, einsum_str).replace(" ", "")


def einsum_kernel(equation: str, x_ndim: int, shape: tuple[int, ...]) -> Kernel | None:
    """Return the axes of w that "x,w->out" sums over, or None where that cannot be said.

    Axes in front that x and out share too are batch axes.
    """
    try:
        x_axes, w_axes, out_axes = parse(equation, x_ndim, len(shape))
    except ValueError:
        return None
    batch_ndim = 0
    while batch_ndim < len(w_axes) and {w_axes[batch_ndim]} <= set(x_axes) & set(out_axes):
        batch_ndim += 1
    slice_axes = w_axes[batch_ndim:]
    contract = tuple(i for i, axis in enumerate(slice_axes) if axis not in out_axes)
    return Kernel(tuple(shape), contract, batch_ndim) if contract else None


def _einsum_kernel(module: nn.Einsum, inputs, einsum_str: str | None = None) -> Kernel | None:
    return einsum_kernel(_einsum_equation(module, einsum_str), inputs.ndim, tuple(module.shape))


def _einsum(
    module: nn.Einsum, box: QuantBox, inputs: jax.Array, einsum_str: str | None = None
) -> jax.Array:
    equation = _einsum_equation(module, einsum_str)
    y, bias = _product(module, box, inputs, "bias" if module.use_bias else None, equation)
    if module.preferred_element_type is not None:
        y = y.astype(module.preferred_element_type)
    if bias is None:
        return y
    _, w_axes, out_axes = parse(equation, inputs.ndim, len(module.shape))
    sizes = dict(zip(w_axes, module.shape))
    return y + bias.reshape([sizes.get(axis, 1) for axis in out_axes])


def _embed_kernel(module: nn.Embed, inputs: jax.Array) -> Kernel:
    return Kernel((module.num_embeddings, module.features), (1,))


def _embed(module: nn.Embed, box: QuantBox, inputs: jax.Array) -> jax.Array:
    if not jnp.issubdtype(inputs.dtype, jnp.integer):
        raise ValueError(f"inputs of an Embed must be integers, got {inputs.dtype}")
    if module.num_embeddings == 1:  # Flax broadcasts the only row
        inputs = jnp.zeros_like(inputs)
    dtype = module.dtype or box.q.dtype
    y = take(box.q, inputs, dtype=dtype)
    if box.adapter is None:
        return y
    return y + like(box.scaling * lora_take(inputs, *box.adapter, dtype), y)


def _attend(module: nn.Embed, box: QuantBox, query: jax.Array) -> jax.Array:
    equation = "...d,vd->...v"  # also right for a table that was quantized along its other axis
    return _product(module, box, query, None, equation)[0]


ROUTES = {
    nn.Dense: {"__call__": Route("kernel", _dense_kernel, _dense)},
    nn.DenseGeneral: {"__call__": Route("kernel", _general_kernel, _dense_general)},
    nn.Einsum: {"__call__": Route("kernel", _einsum_kernel, _einsum)},
    nn.Embed: {
        "__call__": Route("embedding", _embed_kernel, _embed, decodes=False),
        "attend": Route("embedding", _embed_kernel, _attend, decodes=False),
    },
}

# Flax's wrapper hands the plain function beneath a method to interceptors.
METHOD_ROUTES: dict[Any, Route] = {
    getattr(flax_class, name).__wrapped__: route
    for flax_class, methods in ROUTES.items()
    for name, route in methods.items()
}


def _product(
    module: nn.Module, box: QuantBox, inputs: jax.Array, bias: str | None, equation: str = ""
) -> tuple[jax.Array, jax.Array | None]:
    """Return inputs times the kernel, adapter included, and the bias, promoted as Flax does.

    The products run in the layer's dtype if it has one, else in the box's compute dtype; the result
    has the dtype that the float layer would give.
    """
    b = _bias(module, bias)
    # The scalar stands for the kernel, whose dtype takes part in the promotion.
    arrays: list[Any] = [inputs, jnp.zeros((), box.q.dtype)]
    if not isinstance(module, nn.Embed):
        arrays.append(b)
    promoted: list[Any] = module.promote_dtype(*arrays, dtype=module.dtype)
    x, _, *rest = promoted
    b, dtype = rest[0] if rest else None, x.dtype
    x = x if module.dtype is not None else x.astype(box.compute_dtype or dtype)
    return multiply(module, box, x, dtype, equation), b


def multiply(
    module: nn.Module, box: QuantBox, x: jax.Array, dtype: Any, equation: str = ""
) -> jax.Array:
    """Return x, in the dtype to compute in, times the kernel, adapter included, as `dtype`."""
    y = _base(x, box, equation).astype(dtype)
    if box.adapter is None:
        return y
    dropped, batch_ndim = drop(module, x, box.dropout), len(box.q.batch_shape)
    if equation:
        update = lora_einsum(equation, dropped, *box.adapter, box.q.contract_axes, batch_ndim)
    else:
        update = lora_matmul(dropped, *box.adapter, batch_ndim)
    update = box.scaling * update
    if box.lora_magnitude is None:
        return y + like(update, y).astype(dtype)
    again = None if dropped is x else _base(dropped, box, equation)
    factor = _spread(box.lora_magnitude / box.norms(), box, equation, x.ndim, y.ndim)
    return dora_output(y, again, update, factor, None).astype(dtype)


def _base(x: jax.Array, box: QuantBox, equation: str) -> jax.Array:
    return einsum(equation, x, box.q) if equation else matmul(x, box.q)


def _spread(v: jax.Array, box: QuantBox, equation: str, x_ndim: int, ndim: int) -> jax.Array:
    """Reshape a vector [*batch, *out] of the kernel to broadcast against the product."""
    batch_ndim = len(box.q.batch_shape)
    if equation:
        return spread(v, equation, x_ndim, box.q.contract_axes, batch_ndim)
    return v.reshape(*v.shape[:batch_ndim], *(1,) * (ndim - v.ndim), *v.shape[batch_ndim:])


def _bias(module: nn.Module, name: str | None) -> jax.Array | None:
    if name is None:
        return None
    if not module.has_variable("params", name):
        raise errors.ScopeParamNotFoundError(name, path_of(module))
    return meta.unbox(module.get_variable("params", name))


def drop(module: nn.Module, x: jax.Array, rate: float) -> jax.Array:
    """Drop elements of an adapter's input, unless the call is deterministic."""
    deterministic = getattr(module, "deterministic", None)
    deterministic = _deterministic.get() if deterministic is None else deterministic
    if deterministic is None:
        deterministic = not module.has_rng("dropout")
    if deterministic or not rate:
        return x
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape)
    return jnp.where(like(keep, x), x / (1 - rate), np.array(0, x.dtype))
