"""Weights of NNX modules that are not Flax's: which parameters, and how they are contracted.

What says how, in this order: `qjax.register`; the layer of Flax's that a module is a subclass of;
an equation in the attribute `einsum_str`, as einsum modules have it; the shape and the path.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from qjax.core.config import QuantConfig
from qjax.nn.einsum_trace import is_einsum
from qjax.nn.equation import WeightAxes
from qjax.nn.lora import LoraConfig
from qjax.nn.nnx_embed import QuantEmbed
from qjax.nn.nnx_foreign import (
    EinsumCall,
    ForeignLayer,
    adapted_weight,
    adapter_of,
    become_float,
    become_foreign,
    drop_foreign_adapter,
    init_foreign_adapter,
)
from qjax.nn.nnx_param import QuantParam
from qjax.nn.registry import Entry, calls_of, entries_of
from qjax.swap.guess import guess_axes, is_matrix, role_of
from qjax.swap.nnx_find import Found, check_model, layer_class

_EQUATION = "einsum_str"


@dataclasses.dataclass(frozen=True)
class Raw:
    """A parameter of a module that is not Flax's; what is no field is as in `Found`.

    Attributes:
        path: "/"-joined, of the module.
        layer: the module.
        name: of the parameter.
        role: "dense" or "embedding".
        known: how the module uses it, where that is known; else `axes` guesses.
        tells_stack: whether `known` is of one layer, and what the weight has more is stacked.
        stack: number of stacked axes, where it does not tell.
        calls: what runs on the packed weight, in place of methods.
        is_called: whether something does, be it the calls of another parameter.
    """

    path: str
    layer: Any
    name: str
    role: str = "dense"
    known: WeightAxes | None = None
    tells_stack: bool = False
    stack: int = 0
    calls: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
    is_called: bool = False

    @property
    def weight(self) -> nnx.Variable:
        """The weight."""
        return vars(self.layer)[self.name]

    @property
    def weight_path(self) -> str:
        """The weight's path."""
        return f"{self.path}/{self.name}".removeprefix("/")

    @property
    def label(self) -> str:
        """The parameter's name, or that of the list which holds it."""
        return next(n for n in reversed([*self.path.split("/"), self.name]) if not n.isdigit())

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is in 4 bits."""
        return isinstance(self.weight, QuantParam)

    @property
    def is_adapted(self) -> bool:
        """Whether it has an adapter."""
        return adapter_of(self.layer, self.name) is not None

    @property
    def runs_fused(self) -> bool:
        """Whether its products run on the packed weight."""
        return self.is_called or self.role == "embedding"

    @property
    def use(self) -> Any:
        """What weights that share one array have to have in common."""
        return type(self.layer), self.name, self.axes()

    def axes(self) -> WeightAxes:
        """How the module uses the weight, if only by a guess from its shape and path."""
        if self.known is not None:
            return self.known
        # A class may say in its name that it is a mixture of experts.
        names = f"{type(self.layer).__name__}/{self.weight_path}"
        return guess_axes(names, tuple(self.weight.shape)[self.stack :], self.role)

    def put(self, weight: QuantParam, cfg: QuantConfig) -> None:
        """Put a 4-bit weight in place of the float one."""
        weight.set_metadata("compute_dtype", cfg.compute_dtype)
        setattr(self.layer, self.name, weight)
        if self.calls:
            become_foreign(self.layer, self.name, self.calls)

    def check_adapter(self, cfg: LoraConfig) -> None:
        """Raise an error if the weight cannot have such an adapter."""
        if cfg.dora:
            raise NotImplementedError(
                f"{self.weight_path}: dora=True for a parameter of {type(self.layer).__name__}, "
                "which is no layer of Flax's; leave it out by exclude="
            )
        if cfg.dropout and not self.is_called:
            raise ValueError(
                f"{self.weight_path} is decoded at each use, where its adapter can have no "
                f"dropout={cfg.dropout}: qjax.register its class with calls=, or exclude it"
            )

    def add_adapter(
        self, cfg: LoraConfig, rngs: nnx.Rngs, dtype: Any, arrays: tuple[Any, Any] | None = None
    ) -> None:
        """Give the weight an adapter, of A and B in `arrays` or new ones."""
        become_foreign(self.layer, self.name, self.calls)
        init_foreign_adapter(self.layer, self.name, self.axes(), cfg, rngs, dtype, arrays)

    def drop_adapter(self) -> None:
        """Remove its adapter."""
        drop_foreign_adapter(self.layer, self.name)

    def merged(self, dtype: Any) -> jax.Array:
        """Return the float weight with its adapter merged in."""
        return adapted_weight(self.layer, self.name, dtype)

    def to_float(self, weight: nnx.Param, keep_adapter: bool) -> None:
        """Put a float weight in place of the 4-bit one."""
        layer = self.layer
        setattr(layer, self.name, weight)
        if not keep_adapter:
            drop_foreign_adapter(layer, self.name)
        names = layer.weight_names if isinstance(layer, ForeignLayer) else ()
        if not any(adapter_of(layer, n) or isinstance(vars(layer)[n], QuantParam) for n in names):
            become_float(layer)


def find_weights(model: nnx.Module) -> list[Found | Raw]:
    """Return all weights of a model that may be quantized, shared layers by their first path."""
    check_model(model)
    found: list[Found | Raw] = []
    stacks: dict[tuple[str, ...], tuple[int, ...]] = {}  # stacked sizes of layers that tell
    for keys, module in nnx.iter_modules(model, graph=True):
        path = tuple(map(str, keys))
        for weight in _weights_of("/".join(path), module):
            found.append(weight)
            if not isinstance(weight, Raw) or weight.tells_stack:
                with contextlib.suppress(ValueError, AttributeError):
                    shape = tuple(weight.weight.shape)
                    stacks[path] = shape[: len(shape) - len(weight.axes().shape)]
        if isinstance(module, nnx.LayerNorm | nnx.RMSNorm) and module.scale is not None:
            stacks[path] = tuple(module.scale.shape[:-1])
    placed = [_with_stack(f, stacks) if isinstance(f, Raw) else f for f in found]
    return [
        f
        for f in placed
        if not isinstance(f, Raw) or f.known or is_matrix(f.label, f.weight.shape[f.stack :])
    ]


def _weights_of(path: str, module: Any) -> Iterator[Found | Raw]:
    cls = layer_class(module)
    if cls is not None and type(module) in (cls, cls.lora_class, cls.float_class):
        yield Found(path, module, cls)
        return
    own = module.float_class if isinstance(module, ForeignLayer) else type(module)
    is_flax = own.__module__.startswith("flax.") and own not in (nnx.List, nnx.Dict)
    if cls is None and (is_flax or isinstance(module, nnx.Conv | nnx.ConvTranspose)):
        return
    for name in _parameters(module):
        raw = Raw(path, module, name)
        raw = dataclasses.replace(raw, role=role_of(raw.label))
        if cls is not None and name == cls.weight_name:  # a subclass with code of its own
            role = "embedding" if cls is QuantEmbed else "dense"
            weight_axes: Any = cls.weight_axes
            known = None
            with contextlib.suppress(ValueError, AttributeError):  # it may lack Flax's attributes
                known = weight_axes(module)
            raw = dataclasses.replace(raw, role=role, known=known, tells_stack=known is not None)
        yield _described(raw, own)


def _parameters(module: nnx.Module) -> Iterator[str]:
    """Yield the names of a module's own floating parameters of rank 2 and more."""
    for name, value in sorted(vars(module).items()):
        if isinstance(value, QuantParam):
            yield name
        elif isinstance(value, nnx.Param) and not isinstance(value, nnx.LoRAParam):
            array = value.get_raw_value()
            if getattr(array, "ndim", 0) > 1:
                yield name


def _described(raw: Raw, cls: type) -> Raw:
    """Add what the registry says of the weight, or its module's own equation."""
    entries = list(entries_of(cls))
    entry = next((e for e in entries if e.name_in(raw.layer) == raw.name), None)
    shape = tuple(raw.weight.shape)
    if entry is not None:
        equation, calls = entry.equation_of(raw.layer), calls_of(entry, cls)
        raw = dataclasses.replace(raw, role=entry.role, known=entry.axes_in(raw.layer, shape))
    else:
        equation, calls = getattr(raw.layer, _EQUATION, None), {}
        if not isinstance(equation, str):
            return raw
        try:
            own = Entry(cls, raw.name, equation)
            raw = dataclasses.replace(raw, known=own.axes_in(raw.layer, shape))
        except ValueError:  # an attribute of that name with another meaning
            return raw
    if equation is not None:
        calls = calls or _einsum_calls(raw, equation)
    is_called = bool(calls) or (entry is not None and any(calls_of(e, cls) for e in entries))
    tells_stack = equation is not None
    return dataclasses.replace(raw, calls=calls, is_called=is_called, tells_stack=tells_stack)


def _einsum_calls(raw: Raw, equation: str) -> Mapping[str, Callable]:
    if isinstance(raw.layer, ForeignLayer):
        return {m: call for m, name, call in raw.layer.foreign_calls if name == raw.name}
    return {"__call__": EinsumCall(equation)} if is_einsum(raw.layer, raw.name, equation) else {}


def _with_stack(raw: Raw, stacks: Mapping[tuple[str, ...], tuple[int, ...]]) -> Raw:
    """Add how many stacked axes the weight has: those of the layers nearest in the tree, if any."""
    path = tuple(raw.path.split("/")) if raw.path else ()
    near: list[tuple[int, ...]] = []
    for depth in range(len(path), -1, -1):
        near = near or [sizes for other, sizes in stacks.items() if other[:depth] == path[:depth]]
    sizes = min(near, key=len, default=())
    stack = len(sizes) if tuple(raw.weight.shape[: len(sizes)]) == sizes else 0
    if raw.known is not None and not raw.tells_stack:
        raw = dataclasses.replace(raw, known=raw.known._replace(shape=raw.known.shape[stack:]))
    return dataclasses.replace(raw, stack=stack)
