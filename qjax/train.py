"""Training the adapters alone: split a parameter tree, mask it, or wrap the optimizer.

Three ways to the same update, whichever fits the loop at hand. In each of them the 4-bit base gets
no gradient, no optimizer state and no change of a bit.

- `partition` and `combine` split the tree, and the loss is differentiated in the trainable half.
- `lora_optimizer` runs an optimizer on the whole tree, as `TrainState` has it.
- `lora_mask` is for optax's own wrappers, on split trees: the float0 gradients of a whole tree
  break `optax.masked`.

An NNX model needs none of them: `nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey, keystr

from qjax.nn.lora import ADAPTER_LEAVES

PyTree = Any


def partition(params: PyTree) -> tuple[PyTree, PyTree]:
    """Split a parameter tree into its adapters and the rest.

    Args:
        params: any pytree; its adapters are the leaves whose last key is "lora_a", "lora_b" or
            "lora_magnitude".

    Returns:
        `(trainable, frozen)`: two trees like `params`, each with None where the other has a leaf.

    Raises:
        ValueError: there is no adapter.

    Example:
        >>> trainable, frozen = partition({"kernel": 1.0, "lora_a": 2.0})
        >>> trainable, frozen
        ({'kernel': None, 'lora_a': 2.0}, {'kernel': 1.0, 'lora_a': None})
    """
    mask = lora_mask(params)
    trainable = jax.tree.map(lambda keep, leaf: leaf if keep else None, mask, params)
    frozen = jax.tree.map(lambda keep, leaf: None if keep else leaf, mask, params)
    return trainable, frozen


def combine(trainable: PyTree, frozen: PyTree) -> PyTree:
    """Undo `partition`: one tree, its leaves from whichever half has them.

    Raises:
        ValueError: the halves are not of one tree, or both have the same leaf; the path is named.

    Example:
        >>> combine({"kernel": None, "lora_a": 2.0}, {"kernel": 1.0, "lora_a": None})
        {'kernel': 1.0, 'lora_a': 2.0}
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(trainable, is_leaf=_is_none)
    others, other_structure = jax.tree.flatten(frozen, is_leaf=_is_none)
    if structure != other_structure:
        raise ValueError(f"trainable and frozen do not fit: {_difference(trainable, frozen, ())}")
    merged = []
    for (path, leaf), other in zip(leaves, others, strict=True):
        if leaf is not None and other is not None:
            raise ValueError(f"trainable and frozen both have a leaf at {_join(path)}")
        merged.append(other if leaf is None else leaf)
    return jax.tree.unflatten(structure, merged)


def lora_mask(params: PyTree) -> PyTree:
    """Return a tree like `params` of bools, True at the adapters.

    Raises:
        ValueError: there is no adapter.

    Example:
        >>> lora_mask({"kernel": 1.0, "lora_a": 2.0})
        {'kernel': False, 'lora_a': True}
    """
    mask = jax.tree_util.tree_map_with_path(lambda path, _: _is_adapter(path), params)
    if not any(jax.tree.leaves(mask)):
        raise ValueError(
            f"params has no adapters, that is no leaf named {' or '.join(ADAPTER_LEAVES)}; add "
            "them with qjax.add_lora_params (an NNX model is split by nnx.split(model, "
            "nnx.LoRAParam, ...))"
        )
    return mask


def lora_optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Make an optimizer of a whole tree out of `tx`, which sees the adapters alone.

    Every other leaf gets a zero update of its own dtype, whatever its gradient: so gradients may
    come from `jax.grad(..., allow_int=True)`, and `optax.apply_updates` and `TrainState` work on
    trees that hold 4-bit leaves. State exists for the adapters only.

    Call it under `jit`, where the zero updates cost nothing, with the old parameters donated:
    otherwise each step copies the frozen leaves.

    Args:
        tx: any optax optimizer or chain. What clips, accumulates or masks gradients goes in here
            and not around it.

    Raises:
        ValueError: there is no adapter, or `update` is called without `params`.

    Example:
        >>> params = {"kernel": jnp.ones(2, jnp.uint8), "lora_a": jnp.ones(3)}
        >>> tx = lora_optimizer(optax.sgd(0.5))
        >>> gradients = jax.grad(lambda p: p["lora_a"].sum(), allow_int=True)(params)
        >>> updates, _ = tx.update(gradients, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["lora_a"]
        Array([0.5, 0.5, 0.5], dtype=float32)
    """
    tx = optax.with_extra_args_support(tx)

    def init(params):
        return tx.init(partition(params)[0])

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("lora_optimizer: update needs params, update(updates, state, params)")
        trainable, frozen = partition(params)
        updates, state = tx.update(partition(updates)[0], state, trainable, **extra_args)
        return combine(updates, jax.tree.map(_zero_update, frozen)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _is_adapter(path) -> bool:
    # nnx.Variable and nn.Partitioned hold their array in an attribute `value`.
    if path and path[-1] == GetAttrKey("value"):
        path = path[:-1]
    return keystr(path[-1:], simple=True) in ADAPTER_LEAVES


def _zero_update(leaf) -> jax.Array:
    # Minus zero is the zero that keeps every float: -0.0 + 0.0 is +0.0.
    floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return jnp.full_like(leaf, -0.0 if floating else 0)


def _difference(left, right, path) -> str:
    """Say where two trees first differ in structure."""
    children, node = _children(left)
    other_children, other_node = _children(right)
    if node != other_node:
        where = f"at {_join(path)} one" if path else "one"
        return f"{where} has {node} and the other {other_node}"
    for (key, child), (_, other) in zip(children, other_children, strict=True):
        structures = (jax.tree.structure(x, is_leaf=_is_none) for x in (child, other))
        if len(set(structures)) > 1:
            return _difference(child, other, (*path, *key))
    raise AssertionError("the trees have the same structure")


def _children(tree):
    """Return the children of the root, each with its key, and the root's structure."""
    return jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: node is not tree or node is None
    )


def _is_none(node) -> bool:
    return node is None


def _join(path) -> str:
    return keystr(path, simple=True, separator="/")
