"""Whether a module's call is one einsum with its parameter, found out by tracing it."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from qjax.nn.equation import terms

# What may stand around the product: none of these changes a value, but for rounding.
_HARMLESS = {"convert_element_type", "transpose", "reshape", "squeeze", "sharding_constraint"}
_PRODUCT = "dot_general"


def is_einsum(layer: Any, name: str, equation: str) -> bool:
    """Return whether an NNX `layer(x)` is `jnp.einsum(equation, x, w)`, in the layer's `dtype`.

    Args:
        layer: a module, whose arrays may be abstract, and stacked. Without a `dtype` the einsum
            runs in what x and w promote to.
        name: of its parameter w.
        equation: that it is thought to run.
    """
    own = getattr(layer, "dtype", None)
    w = vars(layer)[name]

    def call(w, x):
        graphdef, state = nnx.split(layer, graph=True)
        if len(jax.tree.leaves(state)) != 1:
            raise ValueError("there are other parameters, such as a bias")
        return nnx.merge(graphdef, jax.tree.map(lambda _: w, state))(x)

    return _is_einsum(call, equation, tuple(w.shape), w.dtype, own)


def is_linen_einsum(module: nn.Module, name: str, equation: str, shape: tuple[int, ...]) -> bool:
    """Return whether a Linen `module(equation, x)` is `jnp.einsum(equation, x, w)`.

    Args:
        module: bound or not.
        name: of its parameter w.
        equation: of the call.
        shape: of w.
    """
    bare = module.clone(parent=None, name=None)
    try:
        return _is_linen_einsum(bare, name, equation, shape)
    except TypeError:  # a field that cannot be hashed
        return _is_linen_einsum.__wrapped__(bare, name, equation, shape)


@functools.lru_cache(maxsize=1024)
def _is_linen_einsum(module: nn.Module, name: str, equation: str, shape: tuple[int, ...]) -> bool:
    def call(w, x):
        return module.apply({"params": {name: w}}, equation, x)

    return _is_einsum(call, equation, shape, jnp.dtype(jnp.float32), None)


def _is_einsum(call: Callable, equation: str, shape: tuple[int, ...], dtype: Any, own: Any) -> bool:
    try:
        return all(
            _runs(call, equation, shape, dtype, x_dtype, own)
            for x_dtype in (jnp.float32, jnp.bfloat16)
        )
    except Exception:  # the call is foreign code, which may take other arguments and raise anything
        return False


def _runs(call, equation: str, shape, w_dtype: Any, x_dtype: Any, own: Any) -> bool:
    x_axes, w_axes, out_axes = terms(equation)
    sizes = dict(zip(w_axes, shape[len(shape) - len(w_axes) :], strict=True))
    x_axes, out_axes = (axes.replace("...", "*") for axes in (x_axes, out_axes))
    for axis in x_axes:  # sizes that no other axis has, so that the result's shape tells its axes
        if axis not in sizes:
            sizes[axis] = next(n for n in range(2, 99) if n not in sizes.values())

    def abstract(axes, dtype):
        return jax.ShapeDtypeStruct(tuple(sizes[axis] for axis in axes), dtype)

    jaxpr = jax.make_jaxpr(call)(abstract(w_axes, w_dtype), abstract(x_axes, x_dtype))
    names = list(_primitives(jaxpr.jaxpr))
    dtype = jnp.result_type(x_dtype, w_dtype) if own is None else jnp.dtype(own)
    out: Any = jaxpr.out_avals[0]
    return (
        len(jaxpr.out_avals) == names.count(_PRODUCT) == 1
        and set(names) <= {*_HARMLESS, _PRODUCT}
        and (out.shape, out.dtype) == (tuple(sizes[axis] for axis in out_axes), dtype)
    )


def _inner(param: Any) -> Iterator[Any]:
    """Yield the jaxprs in a parameter of an equation."""
    if isinstance(param, tuple | list):
        for part in param:
            yield from _inner(part)
    elif hasattr(param, "eqns"):
        yield param


def _primitives(jaxpr: Any) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        inner = [sub for param in eqn.params.values() for sub in _inner(param)]
        if not inner:
            yield eqn.primitive.name
        for sub in inner:
            yield from _primitives(sub)
