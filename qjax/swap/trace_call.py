"""Trace a call without computing it, and say what ran for each 4-bit weight."""

import itertools
from collections import defaultdict
from typing import Any

import jax
from flax import nnx

from qjax.core.qtensor import QTensor
from qjax.nn.nnx_param import QuantParam
from qjax.ops import trace
from qjax.swap.leaves import flatten_weights

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
    """Return what ran for each 4-bit leaf in `args[0](tree, *args[1:], **kwargs)`, by path.

    A weight is known by its array, also to ops that are called outside any layer; one that went
    through `scan` or `vmap` since is known where its layer says its path (`qjax.ops.trace.leaf`).
    """
    if not args or not callable(args[0]):
        raise TypeError(
            "example arguments for a parameter tree begin with what to call: a function of the "
            f"tree and the other arguments; got {type(args[0]).__name__ if args else 'none'}"
        )
    return _trace(args[0], tree, args[1:], kwargs)


def _trace(call, state: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")}
    names: dict[int, str] = {}

    def traced(state, arrays):  # flags and other Python values stay what they are
        for path, leaf in flatten_weights(state):
            if isinstance(leaf, QTensor):
                names[id(leaf.packed)] = path
        args, kwargs = treedef.unflatten([arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
        return jax.tree.leaves(call(state, *args, **kwargs))

    with trace.recording(names) as records:
        jax.eval_shape(traced, state, arrays)
    uses = defaultdict(list)
    for path, op, detail in records:
        use = f"{op}: {detail}"
        if use not in uses[path]:
            uses[path].append(use)
    return {path: tuple(found) for path, found in uses.items() if path is not None}
