"""A model or tree as named leaves, and back again.

A name is the "/"-joined path of a leaf. Variables of NNX and partitioned boxes of Linen do not show
in it: the `kernel` of the first of `layers` is `layers/0/kernel`, as in the model's attributes.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from flax.core import meta
from jax.tree_util import keystr

from qjax.core.qtensor import QTensor
from qjax.nn.linen_box import QuantBox
from qjax.nn.lora import ADAPTER_LEAVES
from qjax.nn.nnx_adapter import ShelvedParam
from qjax.nn.nnx_foreign import adapters_of
from qjax.nn.nnx_layer import LoraLayer

# What holds one array, or one QTensor, in its attribute `value`.
_WRAPPERS = (nnx.Variable, meta.Partitioned)


@dataclasses.dataclass
class Marks:
    """What a tree knows beside its leaves, by path.

    Attributes:
        qtensors: path -> QTensor; the static fields matter.
        boxes: path -> QuantBox; the static fields matter.
        scalings: path of what holds lora_a and lora_b -> factor of the adapter.
    """

    qtensors: dict[str, QTensor] = dataclasses.field(default_factory=dict)
    boxes: dict[str, QuantBox] = dataclasses.field(default_factory=dict)
    scalings: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Named:
    """The leaves of a model or tree.

    Attributes:
        leaves: name -> array, `jax.ShapeDtypeStruct` or Python number, in the tree's own order.
        adapters: names of those that belong to adapters.
        marks: what else there is to know.
        kind: "nnx" or "params".
        rebuild: makes the same model or tree from a dict like `leaves`.
    """

    leaves: dict[str, Any]
    adapters: frozenset[str]
    marks: Marks
    kind: str
    rebuild: Callable[[Mapping[str, Any]], Any]

    def adapters_alone(self) -> "Named":
        """Return the adapters; `rebuild` takes all other leaves from the tree."""

        def rebuild(leaves):
            return self.rebuild({**self.leaves, **leaves})

        leaves = {name: leaf for name, leaf in self.leaves.items() if name in self.adapters}
        marks = Marks(scalings=self.marks.scalings)
        return dataclasses.replace(self, leaves=leaves, marks=marks, rebuild=rebuild)


def named(x: Any) -> Named:
    """Name the leaves of an NNX model, an `nnx.State` or any tree, abstract ones too.

    A tree may hold several models and optimizers; what they share stays shared.

    Raises:
        ValueError: x is a single leaf, or two leaves would have one name.
    """
    nodes, structure = jax.tree_util.tree_flatten_with_path(x, is_leaf=_is_module)
    modules = [(_parts(keys), node) for keys, node in nodes if _is_module(node)]
    graphdef, state = nnx.split([module for _, module in modules])
    arrays = jax.tree.map(lambda node: None if _is_module(node) else node, x, is_leaf=_is_module)

    found = _Leaves()
    outside = found.add(arrays, ())
    inside = []
    for i, (path, module) in enumerate(modules):
        inside += found.add(state.get(i), path)
        found.add_scalings(module, path)

    def rebuild(new):
        leaves = [new[name] for name in inside]
        merged = iter(nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), leaves)))
        others = iter([new[name] for name in outside])
        parts = [next(merged if _is_module(node) else others) for _, node in nodes]
        return jax.tree.unflatten(structure, parts)

    kind = "nnx" if modules or isinstance(x, nnx.State) else "params"
    return Named(found.leaves, frozenset(found.adapters), found.marks, kind, rebuild)


class _Leaves:
    """Leaves as they are found."""

    def __init__(self):
        self.leaves, self.adapters, self.marks = {}, set(), Marks()

    def add(self, tree: Any, path: tuple[str, ...]) -> list[str]:
        """Take in the leaves of a tree at `path`; return their names, in the tree's order."""
        names = []
        for inner, leaf, adapter in _walk(tree, path, self.marks):
            name = _join(inner)
            if name in self.leaves:
                raise ValueError(f"two leaves of the tree have the name {name!r}")
            self.leaves[name] = leaf
            names.append(name)
            if adapter:
                self.adapters.add(name)
        return names

    def add_scalings(self, module: Any, path: tuple[str, ...]) -> None:
        """Take in the scalings of a model's adapters, which are in no variable."""
        for inner, layer in nnx.iter_modules(module):
            if isinstance(layer, LoraLayer) and layer.lora_config is not None:
                name = "/".join((*path, *map(str, inner)))
                self.marks.scalings[name] = float(layer.lora_config.scaling)
            for param, adapter in adapters_of(layer):
                name = "/".join((*path, *map(str, inner), param))
                self.marks.scalings[name] = float(adapter.config.scaling)


def _is_module(node: Any) -> bool:
    """Return whether a node is an NNX model, optimizer or the like."""
    return isinstance(node, nnx.Pytree)


def _parts(keys: Any) -> tuple[str, ...]:
    return tuple(keystr((key,), simple=True) for key in keys)


def _walk(
    tree: Any, path: tuple[str, ...], marks: Marks, is_state: bool = False
) -> Iterator[tuple[tuple, Any, bool]]:
    """Yield path, leaf and whether it is an adapter's, in the order of `jax.tree.leaves`.

    An optimizer's state has the names of the adapters, and is none: `is_state` is inside of one.
    """
    _mark(tree, "/".join(path), marks)
    is_state = is_state or _is_optimizer_state(tree)

    def is_node(node):
        known = isinstance(node, (*_WRAPPERS, QTensor, QuantBox)) or _is_optimizer_state(node)
        return node is not tree and known

    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_node)[0]:
        if isinstance(tree, _WRAPPERS):
            keys = keys[1:]
        inner = (*path, *_parts(keys))
        if is_node(leaf):
            yield from _walk(leaf, inner, marks, is_state)
        elif is_state:
            yield inner, leaf, False
        else:
            adapter = isinstance(tree, nnx.LoRAParam) or "".join(inner[-1:]) in ADAPTER_LEAVES
            aside = isinstance(tree, ShelvedParam) and "lora_shelf" in inner
            yield inner, leaf, adapter or aside


def _is_optimizer_state(node: Any) -> bool:
    """Return whether a node is what optax, `qjax.optim` or Flax keeps an optimizer's state in."""
    is_named_tuple = isinstance(node, tuple) and hasattr(node, "_fields")
    of_optax = is_named_tuple and type(node).__module__.split(".")[0] in ("optax", "qjax")
    return of_optax or isinstance(node, nnx.OptState)


def _mark(node: Any, name: str, marks: Marks) -> None:
    # One whose arrays are in the other half of a partitioned tree is not there.
    if isinstance(node, QTensor) and jax.tree.leaves(node):
        marks.qtensors[name] = node
    if isinstance(node, QuantBox):
        if jax.tree.leaves(node.q):
            marks.boxes[name] = node
        if node.adapter is not None:
            marks.scalings[name] = float(node.scaling)


def _join(path: tuple[str, ...]) -> str:
    if not path:
        raise ValueError("a checkpoint holds a model or a tree, not a single array")
    for part in path:
        check_part(part, "/".join(path))
    return "/".join(path)


def check_part(part: str, name: str) -> None:
    """Raise ValueError unless a key of a tree can be part of a name."""
    if part in ("", ".", "..") or "/" in part or "\0" in part:
        raise ValueError(f"{name!r}: a key of a tree must be a plain name, got {part!r}")


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dicts with a leaf for each name.

    Raises:
        ValueError: a name is both a leaf and a dict, or Orbax would mix two names up.
    """
    tree: dict[str, Any] = {}
    dotted: dict[str, str] = {}
    for name, leaf in leaves.items():
        other = dotted.setdefault(name.replace("/", "."), name)
        if other != name:
            raise ValueError(f"Orbax cannot tell {name!r} from {other!r}: it joins keys with dots")
        *parents, last = name.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name!r} is inside {part!r}, which is a leaf")
        if last in node:
            raise ValueError(f"{name!r} is a leaf and holds leaves")
        node[last] = leaf
    return tree


def flatten(tree: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Undo `nest`: name -> leaf of nested dicts."""
    if not isinstance(tree, dict):
        return {"/".join(path): tree}
    return {
        name: leaf
        for key, node in tree.items()
        for name, leaf in flatten(node, (*path, str(key))).items()
    }
