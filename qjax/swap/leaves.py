"""The leaves of models and parameter trees by path, a 4-bit weight as one leaf."""

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from qjax.core.qtensor import QTensor
from qjax.nn.nnx_param import NOTE


def iter_leaves(x: Any) -> Iterator[tuple[str, Any, str | None]]:
    """Yield each leaf's path, its value (a QTensor or an array) and what there is to say of it.

    Args:
        x: an NNX module or state, or a pytree; boxes with a QTensor at `.q` yield that, and their
            `lora_a` and `lora_b` behind it.
    """
    x = nnx.state(x) if isinstance(x, nnx.Module) else x
    if not isinstance(x, nnx.State):
        for path, leaf in flatten_weights(x):
            if hasattr(leaf, "dtype"):
                yield path, leaf, None
        return
    for path, leaf in nnx.to_flat_state(x):
        reason = None
        if isinstance(leaf, nnx.Variable):
            reason, leaf = leaf.get_metadata().get(NOTE), leaf.get_raw_value()
        yield "/".join(map(str, path)), leaf, reason


def flatten_weights(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a pytree by path; QTensors, also those in boxes, are leaves."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_weight)[0]:
        name = path_string(path)
        if isinstance(leaf, QTensor) or not _is_weight(leaf):
            yield name, leaf
            continue
        yield name, leaf.q
        for part in ("lora_a", "lora_b"):
            if getattr(leaf, part, None) is not None:
                yield f"{name}/{part}", getattr(leaf, part)


def _is_weight(x: Any) -> bool:
    return isinstance(x, QTensor) or isinstance(getattr(x, "q", None), QTensor)


def path_string(path: tuple[Any, ...]) -> str:
    """Join a key path of `jax.tree_util` by "/", without the last attribute of a Flax box."""
    keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    boxed = path and isinstance(path[-1], jax.tree_util.GetAttrKey) and keys[-1] == "value"
    return "/".join(keys[:-1] if boxed else keys)
