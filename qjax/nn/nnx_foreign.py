"""NNX modules of other libraries with 4-bit parameters and adapters.

A parameter that became a `QuantParam` is decoded wherever the module reads it, whatever the module
does with it. What this file adds, for a module whose class has changed to a `ForeignLayer`:

- reading a parameter that has an adapter gives the decoded weight with the adapter in it;
- methods that are known to be products (`qjax.register`, or an einsum recognized by its trace) run
  on the packed weight.

The adapter of parameter `w` is `w_lora_a` and `w_lora_b` in the same module.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.core.qtensor import QTensor
from qjax.nn.equation import WeightAxes
from qjax.nn.lora import LoraConfig, init_adapter
from qjax.nn.nnx_param import QuantParam, adapter_params
from qjax.ops import trace
from qjax.ops.lora import lora_einsum, lora_take, lora_weight
from qjax.ops.matmul import einsum
from qjax.ops.ragged import ragged_dot
from qjax.ops.take import take

_PARTS = ("", "_a", "_b", "_dropout")  # what follows "w_lora" in the names of its attributes


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a module remembers of a parameter's adapter, beside the arrays."""

    config: LoraConfig
    contract_axes: tuple[int, ...]  # of a slice

    def batch_ndim(self, a: jax.Array) -> int:
        """Return how many axes A has in front of a slice: stacked ones, unless scanned, experts."""
        return a.ndim - len(self.contract_axes) - 1


class ForeignLayer(nnx.Module):
    """Base of the classes that `foreign_class` makes."""

    float_class: type
    weight_names: tuple[str, ...]
    foreign_calls: tuple[tuple[str, str, Callable], ...]  # method, parameter, what runs


@functools.cache
def _make_class(cls: type, names: tuple[str, ...], calls: tuple) -> type[ForeignLayer]:
    members: dict[str, Any] = {"float_class": cls, "weight_names": names, "foreign_calls": calls}
    members |= {"__module__": cls.__module__, "__doc__": cls.__doc__}
    members |= {name: _weight_property(name) for name in names}
    members |= {method: _method(name, call) for method, name, call in calls}
    members |= _container_members(cls)
    is_pytree = getattr(cls, "_pytree__is_pytree", True)
    return type(cls)(f"Quant{cls.__name__}", (ForeignLayer, cls), members, pytree=is_pytree)


def become_foreign(layer: Any, name: str, calls: Mapping[str, Callable] | None = None) -> None:
    """Change a module's class so that the parameter `name` may have an adapter.

    Args:
        layer: a module of any class.
        name: of the parameter.
        calls: method -> function(module, weight, *args) that is to run in its place.
    """
    old = type(layer)
    cls, names, known = old, {name}, ()
    if isinstance(layer, ForeignLayer):
        cls, names, known = old.float_class, {*old.weight_names, name}, old.foreign_calls
    table = {method: (method, n, call) for method, n, call in known}
    table |= {method: (method, name, call) for method, call in (calls or {}).items()}
    ordered = tuple(table[method] for method in sorted(table))
    layer.__class__ = _make_class(cls, tuple(sorted(names)), ordered)


def become_float(layer: Any) -> None:
    """Give a module its own class back."""
    if isinstance(layer, ForeignLayer):
        layer.__class__ = type(layer).float_class


def _weight_property(name: str) -> property:
    def get(self):
        if name not in vars(self):
            raise AttributeError(name)
        variable = vars(self)[name]
        return variable if adapter_of(self, name) is None else AdaptedWeight(variable, self, name)

    def put(self, value):
        vars(self)[name] = value

    def delete(self):
        del vars(self)[name]

    return property(get, put, delete)


def _container_members(cls: type) -> dict[str, Any]:
    if issubclass(cls, nnx.Dict):  # its items are its attributes
        return {"__iter__": _names_without_adapters}
    if issubclass(cls, nnx.List):  # adapters have names among its numbers
        return {"_pytree__has_int_keys": False}
    return {}


def _names_without_adapters(self) -> Iterator[str]:
    own = tuple(f"{name}_lora{part}" for name in self.weight_names for part in _PARTS)
    return (name for name in self.float_class.__iter__(self) if name not in own)


def _method(name: str, call: Callable) -> Callable:
    def method(self, *args, **kwargs):
        return call(self, Weight(self, name), *args, **kwargs)

    return method


def adapter_of(layer: Any, name: str) -> Adapter | None:
    """Return what a module remembers of a parameter's adapter, None without one."""
    return vars(layer).get(f"{name}_lora")


def adapters_of(layer: Any) -> Iterator[tuple[str, Adapter]]:
    """Yield a module's parameters that have adapters, with what it remembers of those."""
    if isinstance(layer, ForeignLayer):
        for name in layer.weight_names:
            adapter = adapter_of(layer, name)
            if adapter is not None:
                yield name, adapter


def init_foreign_adapter(
    layer: Any,
    name: str,
    axes: WeightAxes,
    config: LoraConfig,
    rngs: nnx.Rngs,
    dtype: Any,
    arrays: tuple[Any, Any] | None = None,
) -> None:
    """Give a parameter of a `ForeignLayer` an adapter; stacked ones get stacked ones.

    Args:
        layer: the module.
        name: of the parameter.
        axes: how one layer uses it.
        config: rank, scaling, dropout and init.
        rngs: its "params" stream gives A, its "dropout" stream the masks.
        dtype: of A and B.
        arrays: A and B, or None for new ones.
    """
    shape = tuple(vars(layer)[name].shape)
    batch = shape[: len(shape) - len(axes.shape) + axes.batch_ndim]
    stack = batch[: len(batch) - axes.batch_ndim]
    if arrays is None:
        sizes = axes.contract_shape, axes.out_shape
        arrays = init_adapter(rngs.params(), *sizes, config, batch, dtype)
    params = adapter_params(vars(layer)[name], axes, [a.astype(dtype) for a in arrays])
    setattr(layer, f"{name}_lora", Adapter(config, axes.contract_axes))
    for part, param in zip("ab", params, strict=True):
        setattr(layer, f"{name}_lora_{part}", param)
    if config.dropout:
        dropout = nnx.Dropout(config.dropout)
        stream = rngs["dropout"]
        dropout.rngs = stream.split(stack) if stack else stream.fork()
        setattr(layer, f"{name}_lora_dropout", dropout)


def drop_foreign_adapter(layer: Any, name: str) -> None:
    """Remove a parameter's adapter."""
    for suffix in _PARTS:
        if f"{name}_lora{suffix}" in vars(layer):
            delattr(layer, f"{name}_lora{suffix}")


def adapted_weight(layer: Any, name: str, dtype: Any = None) -> jax.Array:
    """Return a parameter decoded, its adapter merged in, summed in float32, rounded once."""
    variable, adapter = vars(layer)[name], adapter_of(layer, name)
    value = variable.get_raw_value()
    dtype = value.dtype if dtype is None else dtype
    wide = dtype if adapter is None else jnp.float32
    is_packed = isinstance(value, QTensor)
    w = jax.lax.stop_gradient(value.dequantize(wide)) if is_packed else value.astype(wide)
    if adapter is None:
        return w
    a, b = (vars(layer)[f"{name}_lora_{part}"][...] for part in "ab")
    delta = lora_weight(a, b, adapter.contract_axes, adapter.batch_ndim(a))
    return (w + adapter.config.scaling * delta).astype(dtype)


class AdaptedWeight(QuantParam):
    """What a module reads where its parameter has an adapter: it decodes to the sum of both."""

    __slots__ = ("_source",)

    def __init__(self, variable: nnx.Variable, layer: Any, name: str):
        super().__init__(variable.get_raw_value(), eager_sharding=False)
        object.__setattr__(self, "_source", (variable, layer, name))

    def decode(self) -> jax.Array:
        """Return the weight and its adapter as one float array."""
        variable, layer, name = self._source
        with trace.leaf(variable.get_metadata().get("path")):
            if isinstance(variable, QuantParam):
                trace.record("decode", "whole weight, with its adapter", variable.q)
        return adapted_weight(layer, name)

    def rows(self, ids: jax.Array) -> jax.Array:
        """See `QuantParam`."""
        _, layer, name = self._source
        last = self.q.shape[0] - 1
        return Weight(layer, name).take(jnp.clip(ids, -last - 1, last))

    def update_from_state(self, variable_state: Any) -> None:
        """Update the variable that this stands for."""
        self._source[0].update_from_state(variable_state)


class Weight:
    """One parameter of a module, as the functions that `qjax.register` takes see it."""

    def __init__(self, layer: Any, name: str):
        self._layer, self._name = layer, name

    @property
    def _variable(self) -> nnx.Variable:
        return vars(self._layer)[self._name]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its logical shape."""
        return tuple(self._variable.shape)

    def beside(self, name: str) -> "Weight":
        """Return another parameter of the same module."""
        return Weight(self._layer, name)

    def array(self) -> jax.Array:
        """Return it decoded, adapter included."""
        return getattr(self._layer, self._name)[...]

    def einsum(self, equation: str, x: jax.Array, dtype: Any = None) -> jax.Array:
        """Contract x with it.

        Args:
            equation: "x,w->out".
            x: floating.
            dtype: to run in and to return; None: what x and the weight promote to, the product
                in the `compute_dtype` of the QuantConfig.
        """
        variable = self._variable
        q = variable.get_raw_value()
        result = jnp.result_type(x.dtype, q.dtype) if dtype is None else jnp.dtype(dtype)
        if not isinstance(q, QTensor):
            y = jnp.einsum(equation, x.astype(result), q.astype(result))
            return self._adapt(equation, x.astype(result), y)
        metadata = variable.get_metadata()
        x = x.astype(metadata.get("compute_dtype", result) if dtype is None else result)
        with trace.leaf(metadata.get("path")):
            y = einsum(equation, x, q).astype(result)
        return self._adapt(equation, x, y)

    def ragged_dot(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """Multiply rows [M, K] sorted by expert by it, [E, K, N]; see `qjax.ops.ragged`."""
        variable = self._variable
        q = variable.get_raw_value()
        product: Any = ragged_dot if isinstance(q, QTensor) else jax.lax.ragged_dot
        with trace.leaf(variable.get_metadata().get("path")):
            y = product(x, q, group_sizes)
        adapter = adapter_of(self._layer, self._name)
        if adapter is None:
            return y
        a, b = self._arrays()
        hidden = jax.lax.ragged_dot(self._drop(x), a.astype(x.dtype), group_sizes)
        update = jax.lax.ragged_dot(hidden, b.astype(x.dtype), group_sizes)
        return y + (adapter.config.scaling * update).astype(y.dtype)

    def take(self, ids: jax.Array) -> jax.Array:
        """Return its rows [*ids.shape, D]; it must be a table [V, D]."""
        variable = self._variable
        q = variable.get_raw_value()
        if not isinstance(q, QTensor):
            return jnp.take(self.array(), ids, axis=0)
        with trace.leaf(variable.get_metadata().get("path")):
            y = take(q, ids)
        adapter = adapter_of(self._layer, self._name)
        if adapter is None:
            return y
        return y + adapter.config.scaling * lora_take(ids, *self._arrays(), y.dtype)

    def _arrays(self) -> tuple[jax.Array, jax.Array]:
        a, b = (vars(self._layer)[f"{self._name}_lora_{part}"][...] for part in "ab")
        return a, b

    def _adapt(self, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """Add the adapter's product with x to y, if there is an adapter."""
        adapter = adapter_of(self._layer, self._name)
        if adapter is None:
            return y
        a, b = self._arrays()
        batch_ndim = adapter.batch_ndim(a)
        update = lora_einsum(equation, self._drop(x), a, b, adapter.contract_axes, batch_ndim)
        return y + (adapter.config.scaling * update).astype(y.dtype)

    def _drop(self, x: jax.Array) -> jax.Array:
        dropout = vars(self._layer).get(f"{self._name}_lora_dropout")
        return x if dropout is None else dropout(x)


@dataclasses.dataclass(frozen=True)
class EinsumCall:
    """`__call__` of a module that is one einsum; equal ones make one class."""

    equation: str

    def __call__(self, module: Any, weight: Weight, x: jax.Array) -> jax.Array:
        """Run it."""
        return weight.einsum(self.equation, x, getattr(module, "dtype", None))
