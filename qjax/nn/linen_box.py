"""QuantBox: the leaf of a Linen parameter tree that holds a 4-bit kernel and its adapter.

Flax asks a box (`flax.core.meta.AxisMetadata`) for its content wherever a module reads a parameter,
so a module that knows nothing of qjax gets the decoded kernel, under `nn.scan` and `nn.remat` too.
qjax's own layers, and all layers inside `qjax.apply`, take the box and decode in the product.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from flax import errors
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from qjax.core.blockwise import quantize, quantize_like
from qjax.core.config import QuantConfig
from qjax.core.placement import adapter_specs, like, place, weight_shardings, weight_specs
from qjax.core.qtensor import QTensor
from qjax.nn.lora import ADAPTER_LEAVES, LoraConfig, init_adapter
from qjax.nn.stack_axes import from_front, items_from_front, items_to_front, to_front
from qjax.ops import trace
from qjax.ops.dora import column_norms, dora_weight
from qjax.ops.lora import lora_weight
from qjax.ops.lora_init import loftq, pissa


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("q", *ADAPTER_LEAVES),
    meta_fields=(
        "scaling",
        "dropout",
        "names",
        "compute_dtype",
        "float_box",
        "stack_axes",
        "lead",
        "path",
    ),
)
@dataclasses.dataclass(frozen=True)
class QuantBox(meta.AxisMetadata):
    """A 4-bit kernel, where a Linen parameter tree had the float one.

    Its content is `stop_gradient(q.dequantize()) + scaling * A B`, with DoRA of other lengths. As a
    pytree it shows the paths `kernel/q/packed`, `kernel/q/scales/...`, `kernel/lora_a`,
    `kernel/lora_b` and `kernel/lora_magnitude`.

    Attributes:
        q: the weight.
        lora_a: [*batch, *contract, rank] float32, or None.
        lora_b: [*batch, rank, *out] float32, or None.
        lora_magnitude: [*batch, *out] float32 of DoRA, or None.
        scaling: factor of the adapter.
        dropout: probability of dropping an element of the adapter's input.
        names: of q's axes, as `nn.Partitioned` has those of the kernel, or None.
        compute_dtype: that layers without a `dtype` of their own multiply in; None: as Flax would.
        float_box: class and other fields of the box that the names are from.
        stack_axes: where the float kernel has the axes of stacked layers, which q has in front, if
            not in front: see `qjax/nn/stack_axes.py`.
        lead: number of axes of size 1 in front of every array, while a scan goes over axis `lead`.
        path: in the tree, while `qjax.report` traces a call; else None.
    """

    q: QTensor
    lora_a: jax.Array | None = None
    lora_b: jax.Array | None = None
    lora_magnitude: jax.Array | None = None
    scaling: float = 1.0
    dropout: float = 0.0
    names: tuple[Any, ...] | None = None
    compute_dtype: Any = None
    float_box: tuple[type[meta.Partitioned], tuple[tuple[str, Any], ...]] = (meta.Partitioned, ())
    stack_axes: tuple[int, ...] = ()
    lead: int = 0
    path: str | None = None

    @property
    def adapter(self) -> tuple[jax.Array, jax.Array] | None:
        """A and B, if there are any."""
        return None if self.lora_a is None or self.lora_b is None else (self.lora_a, self.lora_b)

    def unbox(self, apply_constraint: bool = True) -> jax.Array:
        """Return the kernel in its logical dtype, adapter included.

        Args:
            apply_constraint: constrain its sharding as the float kernel's box does.

        Raises:
            ValueError: the adapter has dropout, which only `qjax.apply` can do.
        """
        if self.lead:
            return self.without_lead().unbox(apply_constraint)
        if self.path is not None:
            with trace.leaf(self.path):
                trace.record("decode", "whole weight")
        w = self.boxed(self._decoded())
        return w.unbox(apply_constraint) if isinstance(w, meta.Partitioned) else w

    def boxed(self, w: Any) -> Any:
        """Return a float kernel in the box that it had, if any."""
        if self.names is None:
            return w
        cls, fields = self.float_box
        return cls(w, items_from_front(self.names, self.stack_axes), **dict(fields))

    def _decoded(self) -> jax.Array:
        if self.adapter is None:
            w = jax.lax.stop_gradient(self.q.dequantize())
            return from_front(w, self.stack_axes)
        if self.dropout:
            raise ValueError(
                f"an adapter with dropout={self.dropout} cannot be part of a decoded kernel: "
                "call the module through qjax.apply, or inside `with qjax.fused():`"
            )
        return self.merged(self.q.dtype)

    def merged(self, dtype: Any, w: Any = None, name: str = "w") -> jax.Array:
        """Return the kernel plus its adapter in `dtype`, rounded once; dropout plays no part.

        Args:
            dtype: of the sum.
            w: the float kernel to add the adapter to, in the place of the decoded one.
            name: its path, for errors.
        """
        if w is None:
            w = self.q.dequantize(jnp.float32)
        else:
            w = to_front(jnp.asarray(meta.unbox(w), jnp.float32), self.stack_axes)
            if w.shape != self.q.shape:
                raise ValueError(
                    f"source: {name} must be {list(self.q.shape)}, got {list(w.shape)}"
                )
        w = jax.lax.stop_gradient(w)
        where = self.q.contract_axes, len(self.q.batch_shape)
        if self.adapter is not None and self.lora_magnitude is not None:
            w = dora_weight(w, *self.adapter, self.lora_magnitude, self.scaling, *where)
        elif self.adapter is not None:
            w = w + like(self.scaling * lora_weight(*self.adapter, *where), w)
        return from_front(w.astype(dtype), self.stack_axes)

    def without_lead(self) -> "QuantBox":
        """Return the box as a layer inside a scan reads it."""
        if not self.lead:
            return self
        bare = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[self.lead :]), self)
        return dataclasses.replace(bare, lead=0)

    def norms(self) -> jax.Array:
        """Return the norms of the columns, adapter included, that DoRA divides by."""
        assert self.adapter is not None
        where = self.q.contract_axes, len(self.q.batch_shape)
        return column_norms(self.q, *self.adapter, self.scaling, *where)

    def replace_boxed(self, val: Any) -> "QuantBox":
        """Return a box of `val`, quantized as this one, with an adapter that changes nothing."""
        q = self.q
        if isinstance(val, QTensor):
            return dataclasses.replace(self, q=val)
        val = to_front(val, self.stack_axes)
        b = None if self.lora_b is None else jnp.zeros_like(self.lora_b)
        box = dataclasses.replace(self, q=quantize_like(val, q), lora_b=b)
        return box if self.lora_magnitude is None else _with_magnitude(box)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "QuantBox":
        """Take in the axis that `nn.scan` or `nn.vmap` has put at `index` of every array."""
        if index != self.lead:
            raise NotImplementedError(
                f"4-bit kernels are made stacked along axis 0, got axis {index}: use "
                "variable_axes={'params': 0} in nn.scan or nn.vmap, or quantize_params"
            )
        box = self.without_lead()
        stack_axes = (index, *box.stack_axes) if index or any(box.stack_axes) else ()
        names = None if box.names is None else (self._partition_name(params), *box.names)
        return dataclasses.replace(box, names=names, stack_axes=stack_axes)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "QuantBox":
        """Return a box whose arrays `nn.scan` or `nn.vmap` can slice along axis `index`."""
        box = self.without_lead()
        expected = box.stack_axes[0] if box.stack_axes else 0
        if index != expected:
            raise ValueError(
                f"a 4-bit kernel was stacked along axis {expected}, and is scanned along {index}: "
                "quantize_params needs module= and example_args=, or batch_ndim= for axis 0"
            )
        names = box.names
        if names is not None and names[0] != self._partition_name(params):
            raise ValueError(
                f"the axis that is scanned is named {names[0]!r} in the kernel's "
                f"names={names} and {params[meta.PARTITION_NAME]!r} in metadata_params"
            )
        box = jax.tree.map(lambda leaf: leaf.reshape((1,) * index + leaf.shape), box)
        names = None if names is None else names[1:]
        return dataclasses.replace(box, names=names, stack_axes=box.stack_axes[1:], lead=index)

    def _partition_name(self, params: dict[Any, Any]) -> str:
        if meta.PARTITION_NAME not in params:
            raise errors.PartitioningUnspecifiedError(self)
        return params[meta.PARTITION_NAME]

    def get_partition_spec(self) -> "QuantBox":
        """Return a box that holds a PartitionSpec for each array, from the kernel's `names`.

        Codes and scales are [*batch, *out, K]: K takes the name of the first contract axis. In the
        flat layout, whose blocks straddle rows, only batch axes are split. The second level of
        double quantization is whole in every batch slice.
        """
        return self._map_arrays(weight_specs(self.q, self.names), self._adapter_specs(self.names))

    def get_sharding(self, mesh: jax.sharding.Mesh) -> "QuantBox":
        """Return a box that holds a NamedSharding for each array.

        Raises:
            ValueError: a shard would split a block.
        """
        return self.shardings(NamedSharding(mesh, PartitionSpec(*(self.names or ()))), "a kernel")

    def shardings(self, sharding: NamedSharding, name: str) -> "QuantBox":
        """Return a box of NamedShardings, from that of the float kernel.

        Raises:
            ValueError: a shard would split a block; the kernel is called `name`.
        """
        adapter = [NamedSharding(sharding.mesh, s) for s in self._adapter_specs(sharding.spec)]
        if self.q.packed is None:  # the half of a partitioned tree that has the adapters
            return self._map_arrays(self.q, adapter)
        return self._map_arrays(weight_shardings(self.q, sharding, name), adapter)

    def placed(self, sharding: NamedSharding | None, name: str) -> "QuantBox":
        """Return the box with its arrays sharded as the float kernel would be."""
        return self if sharding is None else place(self, self.shardings(sharding, name))

    def _adapter_specs(self, spec: Any) -> tuple[PartitionSpec, ...]:
        # The batch axes from A itself: the half of a tree that has it does not have q.
        axes = self.q.contract_axes
        batch_ndim = 0 if self.lora_a is None else self.lora_a.ndim - len(axes) - 1
        a, b = adapter_specs(spec, batch_ndim + len(self.q.slice_shape), batch_ndim, axes)
        return a, b, PartitionSpec(*b[:batch_ndim], *b[batch_ndim + 1 :])

    def _map_arrays(self, q: QTensor, adapter: Sequence[Any]) -> "QuantBox":
        """Return a box of other things than arrays, with an adapter where this one has one."""
        a, b, magnitude = adapter if self.adapter is not None else (None, None, None)
        magnitude = None if self.lora_magnitude is None else magnitude
        return dataclasses.replace(self, q=q, lora_a=a, lora_b=b, lora_magnitude=magnitude)


def box_kernel(
    w: Any,
    cfg: QuantConfig,
    contract_axes: tuple[int, ...],
    batch_ndim: int,
    name: str,
    *,
    check_finite: bool = True,
    stack_axes: tuple[int, ...] = (),
) -> QuantBox:
    """Quantize a kernel, or an `nn.Partitioned` one, whose names the box takes over.

    Args:
        w: floating [*batch, *slice].
        cfg: for this kernel: the overrides of its path are applied already.
        contract_axes: of the slice.
        batch_ndim: leading axes of stacked layers or experts.
        name: the kernel's path, for errors.
        check_finite: refuse NaN and inf where they can be seen.
        stack_axes: where w has the axes of stacked layers, if not in front.
    """
    names, float_box = None, QuantBox.float_box
    stack_axes = stack_axes if any(stack_axes) else ()
    if isinstance(w, meta.Partitioned):
        names, float_box = items_to_front(w.names, stack_axes), (type(w), _box_fields(w))
        w = w.value
    w = jnp.asarray(w) if isinstance(w, np.ndarray) else w
    w = to_front(w, stack_axes) if stack_axes else w
    q = quantize(w, cfg, contract_axes, check_finite, batch_ndim=batch_ndim, name=name)
    box = QuantBox(q, names=names, compute_dtype=cfg.compute_dtype, float_box=float_box)
    return dataclasses.replace(box, stack_axes=stack_axes)


def _box_fields(box: meta.Partitioned) -> tuple[tuple[str, Any], ...]:
    """Return the fields of a float kernel's box beside value and names: mesh, logical rules."""
    fields = {f.name: getattr(box, f.name) for f in dataclasses.fields(box)}
    given = {k: v for k, v in fields.items() if k not in ("value", "names") and v is not None}
    return tuple((k, tuple(map(tuple, v)) if k == "rules" else v) for k, v in given.items())


def with_adapter(
    box: QuantBox, cfg: LoraConfig, key: jax.Array, name: str, w: Any = None
) -> QuantBox:
    """Return the box with a new adapter.

    It changes nothing until it is trained, unless `cfg.init` is one that reads the float kernel
    `w`. The adapter of an embedding has no dropout, as in PEFT: its input is an index.

    Raises:
        ValueError: the box has an adapter already.
        NotImplementedError: DoRA for an embedding.
    """
    if box.lora_a is not None:
        raise ValueError(f"{name} has an adapter already")
    is_table = name.split("/")[-1] == "embedding"
    if cfg.dora and is_table:
        raise NotImplementedError(f"{name}: dora=True for an embedding; leave it out by exclude=")
    q = box.q
    if cfg.reads_weights:
        w = meta.unbox(w)
        if jnp.shape(w) != q.shape:
            raise ValueError(f"source: {name} must be {list(q.shape)}, got {list(jnp.shape(w))}")
        args = (jnp.asarray(w), q, cfg.rank, cfg.scaling, q.contract_axes, len(q.batch_shape), key)
        q, a, b = pissa(*args) if cfg.init == "pissa" else loftq(*args, cfg.loftq_iterations)
        box = dataclasses.replace(box, q=q)
    else:
        a, b = init_adapter(key, q.contract_shape, q.out_shape, cfg, q.batch_shape)
    dropout = 0.0 if is_table else cfg.dropout
    box = dataclasses.replace(box, lora_a=a, lora_b=b, scaling=cfg.scaling, dropout=dropout)
    return (_with_magnitude(box) if cfg.dora else box).placed(box.q.sharding, name)


def _with_magnitude(box: QuantBox) -> QuantBox:
    """Return the box with magnitudes that change nothing."""
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(box))
    norms = jax.eval_shape(QuantBox.norms, box) if abstract else box.norms()
    return dataclasses.replace(box, lora_magnitude=norms)


def is_quant_box(leaf: Any) -> bool:
    """Return whether a node of a parameter tree is a 4-bit kernel."""
    return isinstance(leaf, QuantBox)


def _to_state_dict(box: QuantBox) -> dict[str, Any]:
    return unflatten_dict(_arrays(box))


def _from_state_dict(box: QuantBox, state: dict[str, Any]) -> QuantBox:
    where = flax.serialization.current_path()
    expected, given = _arrays(box), dict[tuple[str, ...], Any](flatten_dict(state))
    if set(expected) != set(given):
        missing, unknown = (
            sorted("/".join(key) for key in keys)
            for keys in (set(expected) - set(given), set(given) - set(expected))
        )
        raise ValueError(f"{where}: a 4-bit kernel lacks {missing} and does not know {unknown}")
    for key, leaf in expected.items():
        new = given[key]
        if np.shape(new) != np.shape(leaf) or new.dtype != leaf.dtype:
            raise ValueError(
                f"{where}/{'/'.join(key)} must be {leaf.dtype}{list(np.shape(leaf))}, "
                f"got {new.dtype}{list(np.shape(new))}"
            )
    return jax.tree.unflatten(jax.tree.structure(box), [given[key] for key in expected])


def _arrays(box: QuantBox) -> dict[tuple[str, ...], Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(box)
    return {tuple(key.name for key in path): leaf for path, leaf in leaves}


flax.serialization.register_serialization_state(QuantBox, _to_state_dict, _from_state_dict)
