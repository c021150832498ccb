"""QuantParam: the NNX Variable that holds a 4-bit weight."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.spmd import get_var_pspec
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from qjax.core.placement import (
    adapter_specs,
    place,
    sharding_of,
    weight_shardings,
    weight_specs,
)
from qjax.core.qslice import taken
from qjax.core.qtensor import QTensor
from qjax.nn.equation import WeightAxes
from qjax.ops import trace
from qjax.ops.take import take

NOTE = "qjax_note"  # metadata: why quantize_model left a weight alone, or why it is decoded
# Metadata of the float variable alone, or (compute_dtype) of a QuantParam whose module has no such
# attribute.
_FLOAT_ONLY = ("hijax", "ref", "eager_sharding", "compute_dtype", NOTE)
# Metadata that say how the float array is sharded, and Flax's own eager sharding switched off: it
# would put that spec on every array of the weight.
SHARDING = ("out_sharding", "sharding_rules", "mesh")
NOT_EAGER = {"eager_sharding": False}
_DECODED_OPERATORS = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg")
_DECODED_OPERATORS += ("matmul", "rmatmul")


class QuantParam(nnx.Variable):
    """A frozen 4-bit weight in the place of an `nnx.Param`; not a Param itself.

    Its value, and so the leaf in states and checkpoints, is a `QTensor` (`.q`); inside a scan over
    stacked layers it is a `QSlice`. Code that knows
    nothing of this, such as `layer.kernel[...]`, `x @ layer.kernel` or `jnp.dot(x, layer.kernel)`,
    gets the decoded array, of the logical dtype and with no gradient.

    Its `out_sharding` is that of the float array. Flax's `nnx.get_partition_spec` and its like get
    a spec for each array of the QTensor from it.

    Example:
        >>> kernel = QuantParam(qjax.quantize(jnp.ones((64, 2))))
        >>> kernel[...].shape, kernel.q.packed.shape
        ((64, 2), (2, 32))
    """

    @property
    def q(self) -> Any:
        """The QTensor, or `QSlice`."""
        return self.get_raw_value()

    def decode(self) -> jax.Array:
        """Return the weight as a float array; `qjax.report` lists the use as a decode."""
        with trace.leaf(self.get_metadata().get("path")):
            trace.record("decode", "whole weight", taken(self.q))
        return jax.lax.stop_gradient(self.q.dequantize())

    def get_value(self, *, index: Any = None) -> Any:
        """Return the QTensor, or with an index the decoded array there."""
        if index is None:
            return super().get_value()
        if _is_lookup(index, self.q):
            return self.rows(index[0] if isinstance(index, tuple) else index)
        return self.decode()[index]

    def rows(self, ids: jax.Array) -> jax.Array:
        """Return rows of a table; as array indexing has it, those outside are the nearest."""
        last = self.q.shape[0] - 1
        with trace.leaf(self.get_metadata().get("path")):
            return take(self.q, jnp.clip(ids, -last - 1, last))

    def set_value(self, value: Any, *, index: Any = None) -> None:
        """Replace the QTensor; there is no assigning to parts of it."""
        if index is not None:
            raise TypeError(
                "a QuantParam cannot be assigned to by index; quantize a float array with "
                "qjax.quantize and use set_value"
            )
        super().set_value(self._per_array(value))

    def replace(self, *value: Any, **metadata: Any) -> nnx.Variable:
        """Return a variable of another value, such as a PartitionSpec, and other metadata."""
        return super().replace(*map(self._per_array, value), **metadata)

    def _per_array(self, value: Any) -> Any:
        """Return what Flax says of the float array, said of each array of the QTensor."""
        if isinstance(value, PartitionSpec):
            return weight_specs(self.q, value)
        if isinstance(value, jax.ShapeDtypeStruct) and value.sharding is not None:
            name = self.get_metadata().get("path") or "a 4-bit weight"
            return place(self.q, weight_shardings(self.q, value.sharding, name))
        return value

    @property
    def value(self) -> jax.Array:
        """The decoded array, for code written before Flax deprecated `.value`."""
        warnings.warn("'.value' is deprecated by Flax; use [...]", DeprecationWarning, stacklevel=2)
        return self.decode()

    def __jax_array__(self) -> jax.Array:
        return self.decode()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(jax.Array, name):
                raise
        return getattr(self.decode(), name)


def _is_lookup(index: Any, q: Any) -> bool:
    """Return whether an index asks for rows of a table whose blocks run along the rows."""
    ids = index[0] if isinstance(index, tuple) and len(index) == 1 else index
    is_table = isinstance(q, QTensor) and (q.ndim, q.contract_axes) == (2, (1,))
    return is_table and isinstance(ids, jax.Array) and jnp.issubdtype(ids.dtype, jnp.integer)


def _decoded_operator(name: str):
    def operator(self, *args):
        args = [a[...] if isinstance(a, nnx.Variable) else a for a in args]
        return getattr(self.decode(), name)(*args)

    operator.__name__ = name
    return operator


for _name in _DECODED_OPERATORS:
    setattr(QuantParam, f"__{_name}__", _decoded_operator(f"__{_name}__"))


def quant_metadata(variable: nnx.Variable) -> dict[str, Any]:
    """Return what a QuantParam keeps of a float variable's metadata, or the other way round."""
    metadata = variable.get_metadata()
    kept = {k: v for k, v in metadata.items() if k not in _FLOAT_ONLY and not k.startswith("on_")}
    return {**kept, **NOT_EAGER} if kept.get("out_sharding") else kept


def variable_sharding(variable: nnx.Variable) -> NamedSharding | None:
    """Return the sharding of a float or 4-bit weight, as its float array has it.

    Where a trace does not know it, on a mesh with automatic axes, the metadata say it.
    """
    value = variable.get_raw_value()
    is_weight = isinstance(value, QTensor)
    sharding = value.sharding if is_weight else sharding_of(value)
    array = value.packed if is_weight else value
    metadata = variable.get_metadata()
    if sharding is not None or not metadata.get("out_sharding"):
        return sharding
    mesh = metadata.get("mesh") or jax.sharding.get_abstract_mesh()
    if mesh.empty or not isinstance(array, Tracer):
        return None
    return NamedSharding(mesh, get_var_pspec(variable) or PartitionSpec())


def adapter_params(weight: nnx.Variable, axes: WeightAxes, arrays: Any) -> list[nnx.LoRAParam]:
    """Return A and B as parameters that are sharded as the weight is."""
    ndim, metadata = len(weight.shape), weight.get_metadata()
    axes_of = ndim, ndim - len(axes.shape) + axes.batch_ndim, axes.contract_axes
    sharding = variable_sharding(weight)
    if sharding is not None:
        specs = adapter_specs(sharding.spec, *axes_of)
        arrays = place(tuple(arrays), tuple(NamedSharding(sharding.mesh, s) for s in specs))
    if not metadata.get("out_sharding"):
        return [nnx.LoRAParam(a) for a in arrays]
    kept = {key: metadata[key] for key in SHARDING if key in metadata} | NOT_EAGER
    return [
        nnx.LoRAParam(a, **{**kept, "out_sharding": tuple(spec)})
        for a, spec in zip(arrays, adapter_specs(metadata["out_sharding"], *axes_of), strict=True)
    ]
