"""Where the arrays of a language model go on a mesh: tensor parallelism and FSDP by axis names.

Attention and MLP are split as in Megatron-LM (arXiv:1909.08053): the first products by columns, the
last ones by rows, so that a block needs one sum over the tensor axis after each half. FSDP splits
the other axis of the same weights. An axis of an array that the mesh does not divide, or whose
shards would split a block of a 4-bit weight, stays whole; over the tensor axis attention does where
it would split the heads of keys and values.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qjax.core.qtensor import QTensor

# What each part of a rule may be called on a mesh; axes of data leave weights whole.
_NAMES = {
    "tensor": ("tensor", "tp", "model"),
    "fsdp": ("fsdp",),
    "expert": ("expert", "ep"),
    "data": ("data", "dp", "batch"),
}
_COLUMNS = ("fsdp", "tensor")  # of a kernel [in, out]
_ROWS = ("tensor", "fsdp")
_RULES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), _COLUMNS),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "lm_head"), _COLUMNS),
    **dict.fromkeys(("o_proj", "down_proj", "embed_tokens"), _ROWS),
}


class Placement:
    """Says where each array goes.

    Args:
        mesh: its axes are named "tensor" (or "tp", "model"), "fsdp", "expert" ("ep") and "data"
            ("dp", "batch"), each or none of them; taken as automatic.
        heads: of keys and values.

    Raises:
        ValueError: an axis of another name.
    """

    def __init__(self, mesh: Mesh, heads: int):
        self.mesh = Mesh(mesh.devices, mesh.axis_names)
        self._axes = {role: tuple(n for n in mesh.axis_names if n in names)
                      for role, names in _NAMES.items()}  # fmt: skip
        tensor = math.prod(mesh.shape[name] for name in self._axes["tensor"])
        self._splits_heads = heads % tensor > 0
        known = [name for names in _NAMES.values() for name in names]
        if unknown := sorted(set(mesh.axis_names) - set(known)):
            raise ValueError(f"mesh has axes {unknown}; a model is split over axes named {known}")

    def __call__(self, path: str, array: Any) -> Any:
        """Return the sharding of an array, for a QTensor one of each of its arrays.

        Args:
            path: such as "layers/0/mlp/up_proj/kernel".
            array: of the whole weight, which may be abstract.
        """
        *_, layer, leaf = path.split("/")
        rule = _RULES.get(layer, ())
        if leaf == "bias":
            rule = rule[1:] if rule is _COLUMNS else ()
        if self._splits_heads and "_attn/" in path:
            rule = tuple(role if role != "tensor" else None for role in rule)
        spec: list = [None] * (array.ndim - len(rule))
        spec += [self._axes[role] or None if role else None for role in rule]
        if "/experts/" in path:  # [experts, ...], behind the layers where they are stacked
            axis = array.ndim - (3 if leaf == "kernel" else 2)
            spec[axis] = self._axes["expert"] or None
        if not isinstance(array, QTensor):
            return self._sharding(array.shape, spec)
        return self._weight_shardings(array, spec)

    def _weight_shardings(self, q: QTensor, spec: list) -> Any:
        """Return a sharding for each array of a weight, from the spec of [*batch, in, out]."""
        (contract,) = q.contract_axes  # layers of two axes alone
        batch, kernel = spec[:-2], spec[-2:]
        first = [*batch, kernel[1 - contract], kernel[contract]]  # of codes and of scales a block
        leaves = [leaf for leaf in jax.tree.leaves(q) if leaf.ndim == len(first)]
        for leaf in leaves:  # as many scales as codes' blocks on each shard
            first = self._fitting(leaf.shape, first)
        if q.layout == "flat":  # [*batch, bytes]: blocks run over the ends of rows
            leaves = []
        held = {id(leaf) for leaf in leaves}
        return jax.tree.map(
            lambda leaf: self._sharding(leaf.shape, first if id(leaf) in held else batch), q
        )

    def _sharding(self, shape: tuple[int, ...], spec: Sequence) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*self._fitting(shape, spec)))

    def _fitting(self, shape: tuple[int, ...], spec: Sequence) -> tuple:
        """Return the spec without the axes of the mesh that do not divide the shape."""
        spec = (*spec, *[None] * len(shape))[: len(shape)]
        counts = [math.prod(self.mesh.shape[name] for name in entry or ()) for entry in spec]
        return tuple(
            None if size % count else entry
            for size, count, entry in zip(shape, counts, spec, strict=True)
        )
