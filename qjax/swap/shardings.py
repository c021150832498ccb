"""shardings: where each array of a model or tree goes on a mesh, from the model's annotations."""

from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.core import meta
from flax.linen.spmd import logical_to_mesh_axes
from flax.nnx.spmd import get_var_pspec
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr

from qjax.core.placement import weight_shardings
from qjax.core.qtensor import QTensor
from qjax.nn.linen_box import QuantBox


def shardings(x: Any, mesh: jax.sharding.Mesh | None = None) -> Any:
    """Return the sharding of each array of a model or tree, as its float weights are annotated.

    Annotations are NNX's `out_sharding` and Linen's `nn.Partitioned`; logical names go through the
    rules in force (`nnx.logical_axis_rules`, `nn.logical_axis_rules`) or the variable's own. What
    has none is on every device. The result is for `jax.device_put`, for `in_shardings`, or for the
    abstract arrays that `load` takes.

    Args:
        x: an NNX model or optimizer, an `nnx.State`, or a tree of Linen parameters or optimizer
            state; its arrays may be abstract.
        mesh: None for that of `jax.set_mesh`.

    Returns:
        For a model its `nnx.State`, else a tree like x, with a `NamedSharding` for each array.

    Raises:
        ValueError: no mesh, or a shard would split a block of a 4-bit weight: its path, the axis,
            the mesh axis and the block are named.

    Example:
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
        >>> with jax.set_mesh(mesh):
        ...     layer = nnx.Linear(64, 8, kernel_init=init, rngs=nnx.Rngs(0))
        >>> layer = qjax.quantize_model(layer)
        >>> shardings(layer, mesh)["kernel"].get_raw_value().packed.spec
        P('model', None)
    """
    mesh = jax.sharding.get_mesh() if mesh is None else mesh
    if mesh.empty:
        raise ValueError("mesh=None needs a mesh that jax.set_mesh has set, and there is none")
    state = nnx.state(x) if isinstance(x, nnx.Pytree) else x

    def one(path, leaf):
        name = keystr(path, simple=True, separator="/") or "the weight"
        if isinstance(leaf, nnx.Variable):
            spec = get_var_pspec(leaf) or PartitionSpec()
            value = leaf.get_raw_value()
            return leaf.replace(_of_array(value, NamedSharding(mesh, spec), name))
        if isinstance(leaf, QuantBox):
            boxed = leaf.boxed(None)
            return leaf.shardings(NamedSharding(mesh, _linen_spec(boxed)), name)
        sharding = NamedSharding(mesh, _linen_spec(leaf))
        if isinstance(leaf, meta.Partitioned):  # empty in one half of a partitioned tree
            return leaf if leaf.value is None else leaf.replace_boxed(sharding)
        return _of_array(leaf, sharding, name)

    return jax.tree_util.tree_map_with_path(one, state, is_leaf=_is_annotated)


def _is_annotated(node: Any) -> bool:
    return isinstance(node, nnx.Variable | meta.AxisMetadata | QTensor)


def _of_array(value: Any, sharding: NamedSharding, name: str) -> Any:
    return weight_shardings(value, sharding, name) if isinstance(value, QTensor) else sharding


def _linen_spec(box: Any) -> PartitionSpec:
    if isinstance(box, nn.LogicallyPartitioned):
        return logical_to_mesh_axes(box.names, box.rules) or PartitionSpec()
    return PartitionSpec(*box.names) if isinstance(box, meta.Partitioned) else PartitionSpec()
