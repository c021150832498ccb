"""Trace a call without computing it, and say what ran for each 4-bit weight."""

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from qjax.core.qtensor import QTensor
from qjax.nn.linen_box import is_quant_box
from qjax.nn.nnx_param import QuantParam
from qjax.ops import trace
from qjax.swap.leaves import flatten_weights, path_string
from qjax.swap.linen_apply import apply

_WHOLE = "decode: whole weight"
_run = itertools.count()


def trace_nnx(model: nnx.Module, *args: Any, **kwargs: Any) -> dict[str, tuple[str, ...]]:
    """Return what ran for each 4-bit weight in `model(*args, **kwargs)`, by path."""
    model = nnx.clone(model)  # new modules and variables, the same arrays
    run = next(_run)  # unlike any earlier trace, so that no cached one is taken for this
    for path, variable in nnx.to_flat_state(nnx.state(model, QuantParam)):
        variable.set_metadata(path="/".join(map(str, path)), run=run)
    graphdef, state = nnx.split(model)
    return _trace(lambda state, *a, **k: nnx.merge(graphdef, state)(*a, **k), state, args, kwargs)


def trace_tree(tree: Any, *args: Any, **kwargs: Any) -> dict[str, tuple[str, ...]]:
    """Return what ran for each 4-bit leaf in a call with a parameter tree, by path.

    `args[0]` is a Linen module, called by `qjax.apply`, or a function of the tree; the other
    arguments are the call's. Layers say the paths of their weights; outside any layer a weight is
    known by its array, unless it went through `scan` or `vmap`.
    """
    module = args[0] if args else None
    if isinstance(module, nn.Module):
        has_collections = isinstance(tree, Mapping) and "params" in tree
        variables = tree if has_collections else {"params": tree}
        call = functools.partial(apply, module)
        variables = {**variables, "params": _with_paths(variables["params"])}
        uses = _trace(call, variables, args[1:], kwargs, strip="params/")
        return {f"params/{p}": use for p, use in uses.items()} if has_collections else uses
    if not callable(module):
        raise TypeError(
            "example arguments for a parameter tree begin with what to call, a Linen module or a "
            f"function of the tree; got {type(module).__name__}"
        )
    return _trace(module, tree, args[1:], kwargs)


def _with_paths(params: Any) -> Any:
    """Tell each 4-bit leaf its path, for those that no known layer reads."""

    def tell(path, leaf):
        return dataclasses.replace(leaf, path=path_string(path)) if is_quant_box(leaf) else leaf

    return jax.tree_util.tree_map_with_path(tell, params, is_leaf=is_quant_box)


def _trace(call, state: Any, args, kwargs, strip: str = "") -> dict[str, tuple[str, ...]]:
    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")}
    names: dict[int, str] = {}

    def traced(state, arrays):  # flags and other Python values stay what they are
        for path, leaf in flatten_weights(state):
            if isinstance(leaf, QTensor):
                names[id(leaf.packed)] = path.removeprefix(strip)
        args, kwargs = treedef.unflatten([arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
        return jax.tree.leaves(call(state, *args, **kwargs))

    with trace.recording(names) as records:
        jax.eval_shape(traced, state, arrays)
    uses = defaultdict(list)
    for path, op, detail in records:
        use = f"{op}: {detail}"
        if use not in uses[path]:
            uses[path].append(use)
    for found in uses.values():
        if _WHOLE in found and any(use.startswith("decode") for use in found if use != _WHOLE):
            found.remove(_WHOLE)  # the other one says why
    return {path: tuple(found) for path, found in uses.items() if path is not None}
