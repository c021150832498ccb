"""Linen modules of other libraries: methods that `qjax.register` knows, or that are one einsum."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from qjax.nn.einsum_trace import is_linen_einsum
from qjax.nn.linen_box import QuantBox
from qjax.nn.linen_routes import (
    METHOD_ROUTES,
    Kernel,
    Route,
    drop,
    einsum_kernel,
    multiply,
    path_of,
)
from qjax.nn.registry import Entry, calls_of, entries_of
from qjax.ops import trace
from qjax.ops.lora import lora_take
from qjax.ops.ragged import ragged_dot
from qjax.ops.take import take

_looking: ContextVar[bool] = ContextVar("qjax_looking", default=False)


def route_of(context: nn.module.InterceptorContext, args: Sequence[Any]) -> Route | None:
    """Return the route of the method that an interceptor sees, if it is known.

    Args:
        context: as the interceptor gets it.
        args: of the call.
    """
    route = METHOD_ROUTES.get(getattr(context.orig_method, "func", None))
    if route is not None:
        return route
    module = context.module
    for entry in entries_of(type(module)):
        if context.method_name in calls_of(entry, type(module)):
            return _route(entry, entry.name_in(module), context.method_name)
    if context.method_name == "__call__" and args and isinstance(args[0], str):
        return _call_time_einsum(module, args[0])
    return None


def registered_kernels(module: nn.Module) -> Iterator[tuple[str, Kernel, str]]:
    """Yield name, kernel and role of each parameter of a bound module that is registered so."""
    for entry in entries_of(type(module)):
        name = entry.name_in(module)
        if module.has_variable("params", name):
            axes = entry.axes_in(module, _shape(module.get_variable("params", name)))
            if axes is not None:
                yield name, Kernel(axes.shape, axes.contract_axes, axes.batch_ndim), entry.role


def _call_time_einsum(module: nn.Module, equation: str) -> Route | None:
    """Return the route of a module that is called with an equation, and is that einsum."""
    for name in (getattr(module, "weight_name", None), "w", "kernel"):
        if isinstance(name, str) and module.has_variable("params", name):
            value = module.get_variable("params", name)
            if hasattr(value, "unbox") and _is_einsum(module, name, equation, _shape(value)):
                entry = Entry(type(module), name, calls={"__call__": _einsum})
                return _route(entry, name, "__call__")
            return None
    return None


def _einsum(module: nn.Module, weight: "Weight", equation: str, x: jax.Array) -> jax.Array:
    return weight.einsum(equation, x)


def _is_einsum(module: nn.Module, name: str, equation: str, shape: tuple[int, ...]) -> bool:
    if _looking.get():
        return False
    token = _looking.set(True)
    try:
        return is_linen_einsum(module, name, equation, shape)
    finally:
        _looking.reset(token)


def _route(entry: Entry, param: str, method: str) -> Route:
    call = entry.calls[method]

    def kernel(module: nn.Module, *args, **kwargs) -> Kernel | None:
        shape = _shape(module.get_variable("params", param))
        axes = entry.axes_in(module, shape)
        if axes is not None:
            return Kernel(shape, axes.contract_axes, axes.batch_ndim)
        try:
            call(module, _Spy(shape), *args, **kwargs)
        except _Seen as seen:
            return seen.kernel
        return None

    def run(module: nn.Module, box: QuantBox, *args, **kwargs) -> Any:
        return call(module, Weight(module, param, box), *args, **kwargs)

    return Route(param, kernel, run, transposes=True)


def _shape(value: Any) -> tuple[int, ...]:
    if isinstance(value, QuantBox):
        return value.without_lead().q.shape
    return tuple(jnp.shape(getattr(value, "value", value)))


class Weight:
    """One parameter of a module, as the functions that `qjax.register` takes see it."""

    def __init__(self, module: nn.Module, name: str, value: QuantBox | jax.Array):
        self._module, self._name, self._value = module, name, value

    @property
    def shape(self) -> tuple[int, ...]:
        """Its logical shape."""
        return _shape(self._value)

    def beside(self, name: str) -> "Weight":
        """Return another parameter of the same module, which may be in floating point."""
        value: Any = self._module.get_variable("params", name)
        is_box = isinstance(value, QuantBox)
        return Weight(self._module, name, value.without_lead() if is_box else meta.unbox(value))

    def _recorded(self) -> AbstractContextManager[None]:
        return trace.leaf(path_of(self._module, self._name))

    def array(self) -> jax.Array:
        """Return it decoded, adapter included."""
        return meta.unbox(self._value)

    def einsum(self, equation: str, x: jax.Array, dtype: Any = None) -> jax.Array:
        """Contract x with it; see the `Weight` of `qjax/nn/nnx_foreign.py`."""
        box = self._value
        w_dtype = box.q.dtype if isinstance(box, QuantBox) else box.dtype
        result = jnp.result_type(x.dtype, w_dtype) if dtype is None else jnp.dtype(dtype)
        if not isinstance(box, QuantBox):
            return jnp.einsum(equation, x.astype(result), box.astype(result))
        compute = result if dtype is not None else box.compute_dtype or result
        with self._recorded():
            return multiply(self._module, box, x.astype(compute), result, equation)

    def ragged_dot(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """Multiply rows [M, K] sorted by expert by it, [E, K, N]; see `qjax.ops.ragged`."""
        box = self._value
        if not isinstance(box, QuantBox):
            return jax.lax.ragged_dot(x, box, group_sizes)
        with self._recorded():
            y = ragged_dot(x, box.q, group_sizes)
        if box.adapter is None:
            return y
        a, b = (w.astype(x.dtype) for w in box.adapter)
        hidden = jax.lax.ragged_dot(drop(self._module, x, box.dropout), a, group_sizes)
        return y + (box.scaling * jax.lax.ragged_dot(hidden, b, group_sizes)).astype(y.dtype)

    def take(self, ids: jax.Array) -> jax.Array:
        """Return its rows [*ids.shape, D]; it must be a table [V, D]."""
        box = self._value
        if not isinstance(box, QuantBox):
            return jnp.take(box, ids, axis=0)
        with self._recorded():
            rows = take(box.q, ids)
        if box.adapter is None:
            return rows
        return rows + box.scaling * lora_take(ids, *box.adapter, rows.dtype)


class _Seen(Exception):
    def __init__(self, kernel: Kernel | None):
        super().__init__()
        self.kernel = kernel


class _Spy:
    """Stands for a `Weight` to learn what the first use of it sums over."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    def array(self):
        raise _Seen(None)

    def einsum(self, equation: str, x: Any, dtype: Any = None):
        raise _Seen(einsum_kernel(equation.replace(" ", ""), jnp.ndim(x), self.shape))

    def beside(self, name: str):
        raise _Seen(None)

    def ragged_dot(self, x: Any, group_sizes: Any):
        raise _Seen(Kernel(self.shape, (0,), 1))

    def take(self, ids: Any):
        raise _Seen(Kernel(self.shape, (1,)))
