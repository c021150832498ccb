"""Where the arrays of a 4-bit weight are on a mesh, from where its float array would be.

A spec gives each axis of the float array [*batch, *slice] the mesh axes that it is sharded over.
Codes and first-level scales are [*batch, *out, K]: K takes those of the first contract axis. What a
slice has one of, the second level of double quantization too, is whole in every batch slice.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from qjax.core.scales import map_scales, scales_class


def axis_names(entry: Any) -> tuple[str, ...]:
    """Return the mesh axes that an entry of a PartitionSpec names."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return tuple(entry) if isinstance(entry, tuple | list) else (entry,)


def padded(spec: Any, ndim: int) -> tuple:
    """Return a spec's entries for all `ndim` axes."""
    return (*(spec or ()), *[None] * ndim)[:ndim]


def weight_specs(q: Any, spec: Any) -> Any:
    """Return a QTensor with a PartitionSpec for each array of q.

    In the flat layout, whose blocks straddle rows, only batch axes are split.
    """
    batch, rest = _split(q, padded(spec, q.ndim))
    out, contract = [rest[i] for i in q.out_axes], rest[_major(q)]
    make: Any = PartitionSpec
    codes = make(*batch, *out, contract) if q.layout == "rows" else make(*batch, None)
    first = make(*batch, *out, None) if q.kind.bits == 8 else codes  # one scale for a whole row
    cls = scales_class(q.kind, q.double_quant)
    scales = map_scales(cls, first, make(*batch, None), make(*batch))
    return dataclasses.replace(q, packed=codes, scales=scales)


def adapter_specs(
    spec: Any, ndim: int, batch_ndim: int, contract_axes: tuple[int, ...]
) -> tuple[PartitionSpec, PartitionSpec]:
    """Return those of the adapter's A [*batch, *contract, rank] and B [*batch, rank, *out].

    Args:
        spec: of the float weight [*batch, *slice].
        ndim: of the float weight.
        batch_ndim: of them, those in front of a slice.
        contract_axes: of the slice.
    """
    entries = padded(spec, ndim)
    batch, rest = entries[:batch_ndim], entries[batch_ndim:]
    contract = [rest[i] for i in contract_axes]
    out = [entry for i, entry in enumerate(rest) if i not in contract_axes]
    return PartitionSpec(*batch, *contract, None), PartitionSpec(*batch, None, *out)


def weight_shardings(q: Any, sharding: NamedSharding, name: str) -> Any:
    """Return a QTensor with a NamedSharding for each array of q, from the float array's.

    Raises:
        ValueError: a shard would split a block, or the mesh does not divide an axis.
    """
    _check_shards(q, sharding, name)
    return jax.tree.map(
        lambda spec: NamedSharding(sharding.mesh, spec),
        weight_specs(q, sharding.spec),
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def _split(q: Any, entries: tuple) -> tuple[tuple, tuple]:
    batch_ndim = len(q.batch_shape)
    return entries[:batch_ndim], entries[batch_ndim:]


def _major(q: Any) -> int:
    """Return the contract axis whose shards are consecutive in K: the first with a size."""
    return next((i for i in q.contract_axes if q.slice_shape[i] > 1), q.contract_axes[0])


def _check_shards(q: Any, sharding: NamedSharding, name: str) -> None:
    k = math.prod(q.contract_shape)
    batch_ndim = len(q.batch_shape)
    for axis, entry in enumerate(padded(sharding.spec, q.ndim)):
        size, names = q.shape[axis], axis_names(entry)
        count = math.prod(sharding.mesh.shape[n] for n in names)
        if count == 1:
            continue
        where = (
            f"{name}: axis {axis} (of {size}) is sharded over the mesh axis "
            f"{', '.join(map(repr, names))} ({count} devices)"
        )
        if size % count:
            raise ValueError(f"{where}, which does not divide it")
        if axis < batch_ndim:
            continue
        if q.layout == "flat":
            raise ValueError(
                f"{where}, which would split blocks of {q.block_size}: they run over the ends of "
                f"rows, since block_size={q.block_size} does not divide K={k}"
            )
        if axis - batch_ndim not in q.contract_axes:
            continue
        if axis - batch_ndim != _major(q):
            raise ValueError(
                f"{where}, which would split blocks of {q.block_size}: they run along the axes "
                f"{q.contract_axes} flattened, of which only the first can be sharded"
            )
        if q.kind.bits == 4 and (k // count) % q.block_size:
            raise ValueError(
                f"{where}, which would split blocks of {q.block_size}: a shard has {k // count} "
                f"of the K={k} weights of a row; use a block size that divides {k // count}"
            )


def sharding_of(a: Any) -> NamedSharding | None:
    """Return the mesh sharding of an array, abstract or traced ones too; None if unknown.

    What is traced knows its sharding on a mesh with explicit axes alone.
    """
    if isinstance(a, Tracer):
        sharding = jax.typeof(a).sharding
        return sharding if sharding.mesh.explicit_axes else None
    sharding = getattr(a, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def weight_sharding(q: Any) -> NamedSharding | None:
    """Undo `weight_shardings`: the sharding of the float array that q stands for."""
    sharding = sharding_of(q.packed)
    if sharding is None:
        return None
    entries = padded(sharding.spec, q.packed.ndim)
    batch, codes = _split(q, entries)
    slice_entries: list[Any] = [None] * len(q.slice_shape)
    if q.layout == "rows":
        for axis, entry in zip((*q.out_axes, _major(q)), codes, strict=True):
            slice_entries[axis] = entry
    return NamedSharding(sharding.mesh, PartitionSpec(*batch, *slice_entries))


def place(tree: Any, shardings: Any) -> Any:
    """Return the tree with its arrays on these shardings; abstract arrays get them as a note."""

    def one(a, sharding):
        if isinstance(a, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
        if not isinstance(a, Tracer):
            return jax.device_put(a, sharding)
        if sharding.mesh.explicit_axes:
            return jax.sharding.reshard(a, sharding)
        return jax.lax.with_sharding_constraint(a, sharding)

    return jax.tree.map(one, tree, shardings)


def explicit_mesh(*arrays: Any) -> Any:
    """Return the mesh of the first array that has one with explicit axes, else None."""
    for sharding in map(sharding_of, arrays):
        if sharding is not None and sharding.mesh.explicit_axes:
            return sharding.mesh
    return None


def on_mesh(function: Callable, shardings: Any, *args: Any) -> Any:
    """Return `function(*args)` with its results on these shardings.

    Explicit axes of the mesh are automatic inside: the compiler moves what the function needs.
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    if not mesh.explicit_axes:
        return place(function(*args), shardings)
    return jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=shardings)(*args)


def like(a: jax.Array, other: jax.Array) -> jax.Array:
    """Return `a` sharded as another array of its shape, where the mesh has explicit axes."""
    return a if explicit_mesh(other) is None else place(a, sharding_of(other))


def on_device(tree: Any) -> Any:
    """Return the tree with arrays that are in host memory fetched to the device's own."""

    def fetch(a):
        if jax.typeof(a).memory_space != jax.memory.Space.Host:
            return a
        return jax.device_put(a, jax.memory.Space.Device)

    return jax.tree.map(fetch, tree)
