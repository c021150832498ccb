"""A model or tree as named leaves, and back again.

A name is the "/"-joined path of a leaf. NNX variables do not show in it: the `kernel` of the first
of `layers` is `layers/0/kernel`, so that names are those of the model's attributes.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from jax.tree_util import keystr

from qjax.core.qtensor import QTensor
from qjax.train import ADAPTER_NAMES


@dataclasses.dataclass(frozen=True)
class Named:
    """The leaves of a model or tree.

    Attributes:
        leaves: name -> array, `jax.ShapeDtypeStruct` or Python number, in the tree's own order.
        adapters: names of those that belong to adapters.
        qtensors: name -> QTensor.
        kind: "nnx" or "params".
        rebuild: makes the same model or tree from a dict like `leaves`.
    """

    leaves: dict[str, Any]
    adapters: frozenset[str]
    qtensors: dict[str, QTensor]
    kind: str
    rebuild: Callable[[Mapping[str, Any]], Any]

    def adapters_alone(self) -> "Named":
        """Return the adapters; `rebuild` takes all other leaves from the tree."""

        def rebuild(leaves):
            return self.rebuild({**self.leaves, **leaves})

        leaves = {name: leaf for name, leaf in self.leaves.items() if name in self.adapters}
        return dataclasses.replace(self, leaves=leaves, qtensors={}, rebuild=rebuild)


def named(x: Any) -> Named:
    """Name the leaves of an NNX model, an `nnx.State` or any tree, abstract ones too.

    Raises:
        ValueError: x is a single leaf, or two leaves would have one name.
    """
    kind, tree, finish = "params", x, lambda tree: tree
    if isinstance(x, nnx.Module):
        graphdef, tree = nnx.split(x)
        kind, finish = "nnx", lambda state: nnx.merge(graphdef, state)
    elif isinstance(x, nnx.State):
        kind = "nnx"
    structure = jax.tree.structure(tree)
    leaves, adapters, qtensors = {}, set(), {}
    for path, leaf, adapter in _walk(tree, (), qtensors):
        name = _join(path)
        if name in leaves:
            raise ValueError(f"two leaves of the tree have the name {name!r}")
        leaves[name] = leaf
        if adapter:
            adapters.add(name)

    def rebuild(new):
        return finish(jax.tree.unflatten(structure, [new[name] for name in leaves]))

    return Named(leaves, frozenset(adapters), qtensors, kind, rebuild)


def _walk(
    tree, path: tuple[str, ...], qtensors: dict
) -> Iterator[tuple[tuple[str, ...], Any, bool]]:
    """Yield path, leaf and whether it is an adapter's, in the order of `jax.tree.leaves`."""
    if isinstance(tree, QTensor) and jax.tree.leaves(tree):
        qtensors["/".join(path)] = tree

    def is_leaf(node):
        return node is not tree and isinstance(node, nnx.Variable | QTensor)

    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]:
        if isinstance(tree, nnx.Variable):
            keys = keys[1:]  # its attribute `value`
        inner = (*path, *(keystr((key,), simple=True) for key in keys))
        if is_leaf(node):
            yield from _walk(node, inner, qtensors)
        else:
            adapter = isinstance(tree, nnx.LoRAParam) or inner[-1:] in {(n,) for n in ADAPTER_NAMES}
            yield inner, node, adapter


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
