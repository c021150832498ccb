"""offload: 4-bit weights in the host's memory, fetched as they are used."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from qjax.core.qtensor import QTensor
from qjax.nn.linen_box import QuantBox, is_quant_box
from qjax.nn.nnx_param import QuantParam


def offload(x: Any) -> Any:
    """Move the 4-bit weights of a model or tree to pinned host memory, sharded as they are.

    Each product, look-up or decode fetches the weight that it needs, in the backward pass again; of
    layers stacked under a scan, one at a time. Adapters and all else stay where they are.

    Args:
        x: an NNX model, changed in place, or a tree of Linen parameters or QTensors.

    Returns:
        The model itself, or a new tree.

    Raises:
        ValueError: nothing in x is in 4 bits, or the devices have no pinned host memory.

    Example:
        >>> layer = qjax.quantize_model(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
        >>> layer = offload(layer)
        >>> layer.kernel.q.packed.sharding.memory_kind, layer(jnp.ones((1, 64))).shape
        ('pinned_host', (1, 8))
    """
    if isinstance(x, nnx.Module):
        variables = [v for _, v in nnx.iter_graph(x, graph=True) if isinstance(v, QuantParam)]
        _check(variables)
        for variable in variables:
            variable.set_value(_move(variable.q))
        return x
    leaves = jax.tree.leaves(x, is_leaf=_is_weight)
    _check([leaf for leaf in leaves if _is_weight(leaf)])

    def move(leaf):
        if is_quant_box(leaf):
            return dataclasses.replace(leaf, q=_move(leaf.q))
        return _move(leaf) if isinstance(leaf, QTensor) else leaf

    return jax.tree.map(move, x, is_leaf=_is_weight)


def _is_weight(node: Any) -> bool:
    return isinstance(node, QTensor | QuantBox)


def _check(weights: list) -> None:
    if not weights:
        raise ValueError("nothing is in 4 bits, so there is nothing to move to host memory")


def _move(q: QTensor) -> QTensor:
    def one(a):
        device = next(iter(a.sharding.device_set))
        if "pinned_host" not in (memory.kind for memory in device.addressable_memories()):
            raise ValueError(f"{device} has no pinned host memory")
        return jax.device_put(a, a.sharding.with_memory_kind("pinned_host"))

    return jax.tree.map(one, q)
