"""How modules that are not Flax's contract their parameters: `qjax.register`."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
from flax import nnx

from qjax.nn.equation import WeightAxes, equation_axes, terms

ROLES = ("dense", "embedding")


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is known of one parameter of a class; see `register` for the fields."""

    cls: type
    param: str
    equation: str | Callable[..., str] | None = None
    contract_axes: tuple[int, ...] | None = None
    batch_ndim: int = 0
    role: str = "dense"
    calls: Mapping[str, Callable] = dataclasses.field(default_factory=dict)

    def axes_in(self, module: Any, shape: tuple[int, ...]) -> WeightAxes | None:
        """Return how a module uses the parameter, if that is known without a call.

        Args:
            module: of the class.
            shape: of the parameter; of stacked layers, with the stacked axes in front.

        Raises:
            ValueError: the equation does not fit.
        """
        equation = self.equation_of(module)
        if equation is not None:
            return equation_axes(equation, shape[max(len(shape) - len(terms(equation)[1]), 0) :])
        if self.contract_axes is None:
            return None
        return WeightAxes(shape, self.batch_ndim, self.contract_axes)

    def name_in(self, module: Any) -> str:
        """Return the parameter's name in a module, which may hold it in an attribute."""
        name = getattr(module, self.param[1:]) if self.param.startswith(".") else self.param
        return str(name)

    def equation_of(self, module: Any) -> str | None:
        """Return the module's equation, if it is known without a call."""
        if self.equation is None or callable(self.equation):
            return self.equation(module) if self.equation else None
        return self.equation if "->" in self.equation else getattr(module, self.equation)


_entries: dict[type, dict[str, Entry]] = {}


def register(
    cls: type,
    param: str,
    *,
    equation: str | Callable[..., str] | None = None,
    contract_axes: tuple[int, ...] | None = None,
    batch_ndim: int = 0,
    role: str = "dense",
    calls: Mapping[str, Callable] | None = None,
) -> None:
    """Say how a class of modules, NNX or Linen, contracts one of its parameters.

    Without this a parameter of an unknown class is quantized along axes that its shape suggests,
    and decoded whole at each use. The axes make blocks and adapters fit the product; `calls` make
    the product run on the packed weight.

    Args:
        cls: a subclass of `nnx.Module` or `nn.Module`. Subclasses of it are known too.
        param: name of the parameter; ".attribute" if the module has the name in an attribute.
        equation: of the product, "x,w->out"; or the name of the module's attribute that holds it;
            or a function of the module. If an NNX class's `__call__(x)` is this product and nothing
            more, which is found out by tracing it, it needs no `calls`.
        contract_axes: in place of an equation: axes of the parameter that are summed over, counted
            behind the batch axes.
        batch_ndim: with contract_axes: leading axes that the products run over, such as experts.
            Stacked layers do not count.
        role: "dense"; "embedding" for a table [V, D], which stays in floating point by default.
        calls: method name -> function(module, weight, *args, **kwargs) to run in its place, where
            `weight.einsum(equation, x, dtype=None)`, `weight.ragged_dot(x, group_sizes)` and
            `weight.take(ids)` are products with the 4-bit weight and its adapter,
            `weight.beside(name)` is another registered parameter, and `weight.array()` decodes.
            Without a dtype einsum gives what x and the weight promote to.

    Raises:
        TypeError: not a subclass of `nnx.Module` or `nn.Module`.
        ValueError: another role, a method that the class has not, both an equation and axes, or, of
            an NNX class, neither.

    Example:
        >>> class Project(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.w = nnx.Param(rngs.normal((64, 2, 32)))
        ...
        ...     def __call__(self, x):
        ...         return jnp.tanh(jnp.einsum("btd,dnh->btnh", x, self.w[...]))
        >>> register(
        ...     Project,
        ...     "w",
        ...     equation="btd,dnh->btnh",
        ...     calls={"__call__": lambda m, w, x: jnp.tanh(w.einsum("btd,dnh->btnh", x))},
        ... )
        >>> model = qjax.quantize_model(Project(nnx.Rngs(0)))
        >>> qjax.report(model, jnp.ones((1, 3, 64)))["w"].uses
        ('einsum: xla',)
    """
    if not isinstance(cls, type) or not issubclass(cls, nnx.Module | nn.Module):
        raise TypeError(f"cls must be a subclass of nnx.Module or nn.Module, got {cls!r}")
    if role not in ROLES:
        raise ValueError(f"role must be one of {ROLES}, got {role!r}")
    if role == "embedding" and equation is None and contract_axes is None:
        contract_axes = (1,)
    if equation is not None and contract_axes is not None:
        raise ValueError(f"{cls.__name__}.{param}: give equation= or contract_axes=, not both")
    if issubclass(cls, nnx.Module) and equation is None and contract_axes is None:
        raise ValueError(f"{cls.__name__}.{param} needs equation= or contract_axes=")
    for method in calls or ():
        if not callable(getattr(cls, method, None)):
            raise ValueError(f"calls: {cls.__name__} has no method {method!r}")
    axes = None if contract_axes is None else tuple(contract_axes)
    entry = Entry(cls, param, equation, axes, batch_ndim, role, dict(calls or {}))
    _entries.setdefault(cls, {})[param] = entry


def entries_of(cls: type) -> Iterator[Entry]:
    """Yield what is known of a class's parameters; what a subclass says goes before its bases."""
    seen = set()
    for base in cls.__mro__:
        for param, entry in (_entries.get(base) or _known(base)).items():
            if param not in seen:
                seen.add(param)
                yield entry


def calls_of(entry: Entry, cls: type) -> dict[str, Callable]:
    """Return the calls that hold for a subclass too: of methods that it has not overridden."""
    return {
        method: call
        for method, call in entry.calls.items()
        if getattr(cls, method) is getattr(entry.cls, method)
    }


@functools.cache
def _known(cls: type) -> dict[str, Entry]:
    """Return entries of classes that are known by name, so that nothing has to be imported."""
    make = KNOWN.get(f"{cls.__module__}.{cls.__qualname__}")
    return {entry.param: entry for entry in make(cls)} if make else {}


def _scaled(module: Any, y: Any) -> Any:
    scale = getattr(module, "w_scale", None)
    return y if scale is None else y * scale


def _call_time_einsum(cls: type) -> list[Entry]:
    """A Linen einsum whose equation is its first argument, and whose weight has a factor."""

    def call(module, weight, eqn, x):
        return _scaled(module, weight.einsum(eqn, x))

    return [Entry(cls, ".weight_name", calls={"__call__": call})]


def _scaled_einsum(cls: type) -> list[Entry]:
    """An NNX einsum whose weight has a factor."""

    def call(module, weight, x):
        return _scaled(module, weight.einsum(module.einsum_str, x, module.dtype))

    return [Entry(cls, "w", equation="einsum_str", calls={"__call__": call})]


# A module whose call is one einsum and nothing more needs no entry: see `qjax/nn/einsum_trace.py`.
KNOWN: dict[str, Callable[[type], list[Entry]]] = {
    "gemma.gm.nn.gemma4._layers.Einsum": _call_time_einsum,
    "tunix.models.gemma4.model.Einsum": _scaled_einsum,
}
