"""Whether a checkpoint fits the model or tree that it is to be loaded into."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, Sharding

from qjax.checkpoint.header import Header, LeafInfo, key_dtype, statics
from qjax.checkpoint.tree import Named


def check_base(target: Named) -> None:
    """Raise ValueError unless a checkpoint of adapters alone can be loaded into `target`."""
    if not target.adapters:
        raise ValueError(
            "it holds adapters alone and `like` has none: add them first, with qjax.add_lora or "
            "qjax.add_lora_params"
        )
    for name, leaf in target.leaves.items():
        if name not in target.adapters and isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"it holds adapters alone, so `like` must hold the rest, and {name} is abstract"
            )


def compare(header: Header, target: Named) -> None:
    """Raise ValueError at the first difference: the leaf, what `target` needs, what is stored."""
    try:
        same_names("in the checkpoint", header.leaves, "in `like`", target.leaves)
    except ValueError as error:
        raise ValueError(f"{error}{_advice(header, target)}") from None
    found, expected = header.marks.qtensors, target.marks.qtensors
    same_names("a QTensor in the checkpoint", found, "one in `like`", expected)
    for name, q in expected.items():
        _same_fields(name, statics(q), statics(found[name]))
    for name, scaling in target.marks.scalings.items():
        stored = header.marks.scalings.get(name, scaling)  # an nnx.State does not know its scalings
        _same_fields(name, {"scaling": scaling}, {"scaling": stored})
    for name, leaf in target.leaves.items():
        _same_array(name, leaf, header.leaves[name])


def _advice(header: Header, target: Named) -> str:
    """Say what to do where names differ for one reason."""
    if header.marks.qtensors and not target.marks.qtensors:
        return ". Quantize `like` first, with qjax.quantize_model or qjax.quantize_params"
    if target.marks.qtensors and not header.marks.qtensors:
        return ". It holds no quantized weight: load it into a float model, and quantize that"
    if header.marks.scalings and not target.adapters:
        return ". Add adapters to `like` first, with qjax.add_lora or qjax.add_lora_params"
    return ""


def same_names(here: str, found: Iterable[str], there: str, expected: Iterable[str]) -> None:
    """Raise ValueError unless both have the same names, saying which are in one alone."""
    found, expected = set(found), set(expected)
    sides = ((expected - found, there, here), (found - expected, here, there))
    differences = [
        f"{len(names)} {one} and not {other}: {', '.join(sorted(names)[:4])}"
        for names, one, other in sides
        if names
    ]
    if differences:
        raise ValueError("; ".join(differences))


def _same_fields(name: str, expected: dict[str, Any], found: dict[str, Any]) -> None:
    for field, value in expected.items():
        if found[field] != value:
            raise ValueError(f"{name}: expected {field}={value}, found {found[field]}")


def _same_array(name: str, leaf: Any, found: LeafInfo) -> None:
    leaf = np.asarray(leaf) if isinstance(leaf, bool | int | float) else leaf
    if not hasattr(leaf, "dtype"):
        raise TypeError(f"{name} of `like` must be an array or a number, got {type(leaf).__name__}")
    if found.prng is not None or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        dtype = found.dtype if found.prng is None else key_dtype(found)
        if dtype != leaf.dtype:
            raise ValueError(f"{name}: expected {leaf.dtype}, found {dtype}")
        keys = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        leaf = jax.eval_shape(jax.random.key_data, keys)
    expected = LeafInfo(np.dtype(leaf.dtype), tuple(leaf.shape))
    if str(expected) != str(found):
        raise ValueError(f"{name}: expected {expected}, found {found}")


def placement(name: str, leaf: Any) -> Sharding | None:
    """Return the sharding of a leaf, None for wherever JAX would put it.

    Raises:
        ValueError: the sharding does not divide the shape, or is on an abstract mesh while no mesh
            is set.
    """
    committed = isinstance(leaf, jax.Array) and leaf.committed
    sharding = leaf.sharding if committed or isinstance(leaf, jax.ShapeDtypeStruct) else None
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        # What is traced inside `jax.set_mesh` knows the mesh's axes and not its devices.
        mesh = jax.sharding.get_mesh()
        if mesh.abstract_mesh != sharding.mesh:
            raise ValueError(f"{name} is on an abstract mesh: load inside jax.set_mesh(mesh)")
        sharding = NamedSharding(mesh, sharding.spec)
    if sharding is not None:
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return sharding
