"""Products on a mesh with explicit axes, where a trace knows how each operand is sharded.

The 4-bit product is a `shard_map`: each device multiplies its shards, as in `partition` for
automatic axes. Other products are left to the compiler; what is said here is how their results are
sharded: each axis as the operand that it comes from, a mesh axis at most once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from qjax.core.double_quant import single_level
from qjax.core.placement import (
    axis_names,
    explicit_mesh,
    on_mesh,
    padded,
    place,
    weight_shardings,
    weight_specs,
)
from qjax.core.qtensor import QTensor
from qjax.ops.partition import Shard, nbytes, without


def entries(a: jax.Array) -> tuple:
    """Return the mesh axes of each axis of an array; None for those that are not explicit."""
    return padded(jax.typeof(a).sharding.spec, a.ndim)


def compiled(function: Callable, result: Sequence, *args: Any) -> jax.Array:
    """Return `function(*args)` with its result's axes sharded as `result` lists them.

    Where no argument is on explicit axes, that is the plain call.
    """
    mesh = explicit_mesh(*jax.tree.leaves(args))
    if mesh is None:
        return function(*args)
    return on_mesh(function, NamedSharding(mesh, _spec(result)), *args)


def product(x: jax.Array, q: QTensor, transpose: bool, local: Callable) -> jax.Array:
    """Multiply x [*batch, *rows, *summed] by a QTensor: [*batch, *rows, *kept].

    Args:
        x: floating.
        q: the weight.
        transpose: whether its contract axes are the ones kept.
        local: (x, q, shard) -> y, the product of what one device has.
    """
    mesh = explicit_mesh(x, q.packed)
    x_batch, rows = _split(entries(x), len(q.batch_shape))
    rows = rows[: len(rows) - len(q.out_axes if transpose else q.contract_axes)]
    batch, weight = _split(padded(q.sharding and q.sharding.spec, q.ndim), len(q.batch_shape))
    batch = tuple(a or b for a, b in zip(batch, x_batch))
    weight = [without(entry, *batch) for entry in weight]
    kept = [weight[i] for i in (q.contract_axes if transpose else q.out_axes)]
    result = NamedSharding(mesh, _spec([*batch, *rows, *kept]))
    if q.kind.bits == 8:  # an ordinary product
        return on_mesh(functools.partial(local, shard=None), result, x, q)
    # A mesh axis shards one of rows and weight: what is gathered is the smaller one. That does not
    # show in how the result is sharded.
    if nbytes(x) < nbytes(q.packed):
        rows = [without(entry, *batch, *weight) for entry in rows]
    else:
        rows = [without(entry, *batch) for entry in rows]
        weight = [without(entry, *batch, *rows) for entry in weight]
    out, contract = [weight[i] for i in q.out_axes], [weight[i] for i in q.contract_axes]
    if q.double_quant and any(axis_names(entry) for entry in out[1:]):
        # A shard does not hold consecutive rows, of which a second level could be told apart.
        sharding = weight_shardings(q, NamedSharding(mesh, PartitionSpec(*batch, *weight)), "q")
        scales = on_mesh(single_level, sharding.packed, q.scales)
        q = dataclasses.replace(q, scales=scales)

    summed, kept = (out, contract) if transpose else (contract, out)
    specs = PartitionSpec(*batch, *rows, *summed), weight_specs(q, (*batch, *weight))
    pitch = math.prod(q.contract_shape) // q.block_size
    along_rows, along_blocks = next(iter(out), None), next(filter(None, contract), None)
    shard = Shard(mesh, along_rows, along_blocks, transpose, pitch)
    slice_shape = tuple(n // _count(mesh, e) for n, e in zip(q.slice_shape, weight, strict=True))

    def device(x, q):
        return local(x, dataclasses.replace(q, slice_shape=slice_shape), shard)

    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)
    out_specs = PartitionSpec(*batch, *rows, *kept)
    # Kernels say nothing of how their results vary over the mesh, so that cannot be checked.
    mapped = jax.shard_map(device, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
    return place(mapped(*place((x, q), placed)), result)


def _spec(result: Sequence) -> PartitionSpec:
    kept: list[Any] = []
    for entry in result:
        kept.append(without(entry, *kept))
    return PartitionSpec(*kept)


def _split(values: Sequence, count: int) -> tuple[Sequence, Sequence]:
    return values[:count], values[count:]


def _count(mesh: Any, entry: Any) -> int:
    return math.prod(mesh.shape[name] for name in axis_names(entry))


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)
