"""load: everything is compared before an array is read, and checked before anything is built."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from orbax.checkpoint import v1 as ocp

from qjax.checkpoint.assemble import assemble
from qjax.checkpoint.compare import check_base, compare, placement, same_names
from qjax.checkpoint.header import Header, LeafInfo
from qjax.checkpoint.saving import OLD_SUFFIX, checksum
from qjax.checkpoint.tree import flatten, named, nest


def load(path: str | os.PathLike, like: Any = None) -> Any:
    """Load what `save` wrote.

    Args:
        path: of the folder.
        like: a model, state or tree of the same leaves; it may be abstract, as `nnx.eval_shape`
            and `jax.eval_shape` make them. Each array is placed as its own is: on the same mesh,
            whatever the layout it was saved from. A checkpoint of adapters alone takes all else
            from `like`. It is not changed.

    Returns:
        What `like` is, with the arrays of the checkpoint. Without it, nested dicts with QTensors on
        the default device (indices of lists are strings, see `flax.nnx.restore_int_paths`).

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: not a complete checkpoint of `save`, damaged, of a newer format version, or not
            of the leaves, shapes, dtypes and formats of `like`. The path is named, with what was
            expected and found. Nothing is converted, and nothing half loaded.

    Example:
        >>> params = {"kernel": qjax.quantize(jnp.ones((64, 2)))}
        >>> save("weights", params)
        >>> load("weights", like=params)["kernel"].shape
        (64, 2)
    """
    path = pathlib.Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}{_leftover(path)}")
    header = _read_header(path)
    if like is None:
        return assemble(header.marks, _as_jax(_restore(path, header, {})))
    target = named(like)
    try:
        if header.only == "adapters":
            check_base(target)
            target = target.adapters_alone()
        compare(header, target)
        placements = {name: placement(name, leaf) for name, leaf in target.leaves.items()}
    except ValueError as error:
        raise ValueError(f"{path} does not fit `like`: {error}") from None
    arrays = _restore(path, header, placements)
    return target.rebuild(
        {name: _like(arrays.pop(name), leaf) for name, leaf in target.leaves.items()}
    )


def describe(path: str | os.PathLike) -> Any:
    """Return what `load(path)` would, with a `jax.ShapeDtypeStruct` for each array.

    Raises:
        ValueError: not a complete checkpoint of `save`.
    """
    return _shapes(_read_header(pathlib.Path(path).absolute()))


def _leftover(path: pathlib.Path) -> str:
    old = path.with_name(path.name + OLD_SUFFIX)
    return f"; a save with overwrite=True ended early and left {old}" if old.exists() else ""


def _read_header(path: pathlib.Path) -> Header:
    """Return the header, once it and the stored arrays' own descriptions agree."""
    try:
        metadata = ocp.metadata(str(path))
    # Whatever a damaged file makes Orbax raise: KeyError, JSONDecodeError, InvalidLayoutError ...
    except Exception as error:
        raise ValueError(
            f"{path} is not a complete Orbax checkpoint: {_first_line(error)}"
        ) from error
    custom = metadata.custom_metadata
    if not isinstance(custom, dict) or "qjax" not in custom:
        raise ValueError(
            f"{path} has no qjax metadata: it was not written by qjax.save, or it is damaged"
        )
    if not isinstance(metadata.metadata, dict):
        raise ValueError(f"{path} is damaged: Orbax cannot describe its arrays")
    try:
        header = Header.from_json(custom["qjax"])
        _check_stored(header, flatten(metadata.metadata))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return header


def _check_stored(header: Header, stored: Mapping[str, Any]) -> None:
    """Compare the header with what Orbax says is stored; Orbax itself would cast and go on."""
    same_names("in the stored arrays", stored, "in the metadata", header.leaves)
    for name, info in header.leaves.items():
        leaf = stored[name]
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(f"{name}: expected {info}, found {leaf}")
        found = LeafInfo(np.dtype(leaf.dtype), tuple(leaf.shape))
        if str(found) != str(info):
            raise ValueError(f"{name}: expected {info} by the metadata, found {found} stored")
    nest(header.leaves)
    _shapes(header)  # checks each QTensor's fields against its arrays


def _shapes(header: Header) -> Any:
    shapes = {n: jax.ShapeDtypeStruct(i.shape, i.dtype) for n, i in header.leaves.items()}
    return assemble(header.marks, shapes)


def _restore(
    path: pathlib.Path, header: Header, shardings: Mapping[str, Sharding | None]
) -> dict[str, Any]:
    """Read all arrays, onto a sharding or as numpy arrays, and compare their checksums."""
    abstract = {n: _abstract(info, shardings.get(n)) for n, info in header.leaves.items()}
    try:
        arrays = flatten(ocp.load(str(path), nest(abstract)))
    except Exception as error:
        raise ValueError(f"{path} is damaged: {_first_line(error)}") from error
    for name, info in header.leaves.items():
        array = arrays[name]
        found = LeafInfo(np.dtype(array.dtype), tuple(array.shape))
        crc32 = None if info.crc32 is None else checksum(array)
        if (str(found), crc32) != (str(info), info.crc32):
            raise ValueError(
                f"{path} is damaged: {name} was saved as {info} with checksum {info.crc32}, found "
                f"{found} with {crc32}"
            )
        if info.prng is not None:
            keys = jax.random.wrap_key_data(jnp.asarray(array), impl=info.prng)
            sharding = shardings.get(name)
            arrays[name] = keys if sharding is None else jax.device_put(keys, sharding)
    return arrays


def _abstract(info: LeafInfo, sharding: Sharding | None) -> Any:
    """Return what makes Orbax read an array onto its sharding, or as a numpy array."""
    if sharding is None or info.prng is not None:
        return np.broadcast_to(np.zeros((), info.dtype), info.shape)  # takes no memory
    return jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding)


def _like(array: Any, leaf: Any) -> Any:
    """Return a loaded array as the kind of value that `leaf` is."""
    if isinstance(leaf, bool | int | float):
        return type(leaf)(array.item())
    if isinstance(leaf, np.generic):
        return array[()]
    return array if isinstance(leaf, np.ndarray) else jnp.asarray(array)


def _as_jax(arrays: dict[str, Any]) -> dict[str, Any]:
    """Put numpy arrays on the default device; 64-bit ones that JAX would cut stay as they are."""
    for name, array in arrays.items():
        if (
            isinstance(array, np.ndarray)
            and jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
        ):
            arrays[name] = jnp.asarray(array)
    return arrays


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:300]}"
