"""save and save_async: names and checks first, then Orbax, then at most one rename."""

import concurrent.futures
import contextlib
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from orbax.checkpoint import v1 as ocp

from qjax.checkpoint.header import Header, LeafInfo
from qjax.checkpoint.tree import Named, named, nest

# What the folder of a save that replaces another is called until it does, and the other after it.
NEW_SUFFIX, OLD_SUFFIX = ".qjax-new", ".qjax-old"
_UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's own
# Orbax writes it last. (`ocp.is_orbax_checkpoint` also says yes to folders of other things.)
_MARKER = "_CHECKPOINT_METADATA"


def save(
    path: str | os.PathLike, x: Any, only: str | None = None, *, overwrite: bool = False
) -> None:
    """Save a model, a state or a parameter tree as an Orbax checkpoint.

    The folder appears when all of it is written: a crash leaves none, or the one that was there.

    Args:
        path: of the folder to make; its parents are made too.
        x: an NNX model, an `nnx.State`, or any tree of arrays, QTensors and Python numbers.
        only: "adapters" for the adapters alone: `nnx.LoRAParam`s, and leaves named lora_a or
            lora_b; not what an optimizer keeps for them.
        overwrite: replace a checkpoint that is there, once the new one is complete.

    Raises:
        ValueError: the path exists, `only` is unknown or finds nothing, or a name or an empty array
            that Orbax cannot hold.
        TypeError: a leaf is no array, or an abstract or traced one.

    Example:
        >>> save("weights", {"kernel": qjax.quantize(jnp.ones((64, 2)))})
        >>> load("weights")["kernel"].shape
        (64, 2)
    """
    save_async(path, x, only, overwrite=overwrite).result()


def save_async(
    path: str | os.PathLike, x: Any, only: str | None = None, *, overwrite: bool = False
) -> concurrent.futures.Future:
    """Start to `save`, and return when the arrays have been read: they may then change.

    Returns:
        A future; its `result()` waits until the checkpoint is complete, and raises what went wrong.

    Raises:
        ValueError, TypeError: as `save` does, at once.

    Example:
        >>> pending = save_async("weights", {"kernel": jnp.ones((64, 2))})
        >>> pending.result()
    """
    path = pathlib.Path(path).absolute()
    arrays, header = _read(x, only)
    replaces = _check_target(path, overwrite)
    target = path.with_name(path.name + NEW_SUFFIX) if replaces else path
    with _clean_on_failure(target):
        pending = ocp.save_async(
            str(target),
            nest(arrays),
            overwrite=replaces,
            custom_metadata={"qjax": header.to_json()},
        )

    def finish():
        with _clean_on_failure(target):
            pending.result()
        if replaces:
            _swap(target, path)

    return _start(finish)


def _read(x: Any, only: str | None) -> tuple[dict[str, Any], Header]:
    """Return the arrays to store, by name, and what is to be known of them."""
    if only not in (None, "adapters"):
        raise ValueError(f"only must be None or 'adapters', got {only!r}")
    tree = named(x)
    if only == "adapters":
        tree = tree.adapters_alone()
    if not tree.leaves:
        what = "adapters, so none can be saved" if only else "leaves"
        raise ValueError(f"x has no {what}")
    for name, q in tree.marks.qtensors.items():
        q.check(name)
    stored = {name: _stored(leaf, name) for name, leaf in tree.leaves.items()}
    return {name: array for name, (array, _) in stored.items()}, _header(tree, only, stored)


def _header(tree: Named, only: str | None, stored: dict) -> Header:
    leaves = {
        name: LeafInfo(np.dtype(array.dtype), tuple(array.shape), checksum(array), prng)
        for name, (array, prng) in stored.items()
    }
    return Header(tree.kind, only, leaves, tree.marks)


def _stored(leaf: Any, name: str) -> tuple[Any, str | None]:
    """Return a leaf as Orbax is to store it, and the implementation's name of PRNG keys."""
    if isinstance(leaf, Tracer):
        raise TypeError(f"{name} is traced: save cannot run under jit")
    if isinstance(leaf, bool | int | float | np.generic):
        leaf = np.asarray(leaf)
    if not isinstance(leaf, jax.Array | np.ndarray):
        raise TypeError(f"{name} must be an array or a number, got {type(leaf).__name__}")
    if leaf.size == 0:
        raise ValueError(f"{name} is empty, {leaf.shape}: Orbax cannot store empty arrays")
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf), str(jax.random.key_impl(leaf))
    return leaf, None


def checksum(array: jax.Array | np.ndarray) -> int | None:
    """Return the CRC-32 of an array's bytes in C order, None if it spans processes.

    Orbax has checksums for its indexes alone: a flipped bit in a weight would pass.
    """
    if isinstance(array, jax.Array):
        if not array.is_fully_addressable:
            return None
        # A second handle on the same buffers: JAX keeps the host copy with the handle it is asked
        # through, and this one goes.
        shards = [shard.data for shard in array.addressable_shards]
        array = jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)
    host = np.ascontiguousarray(array)
    return zlib.crc32(host.reshape(-1).view(np.uint8))


def _check_target(path: pathlib.Path, overwrite: bool) -> bool:
    """Return whether there is a checkpoint to replace."""
    if not os.path.lexists(path):
        return False
    if not overwrite:
        raise ValueError(f"{path} exists; overwrite=True replaces a checkpoint")
    if jax.process_count() > 1:
        raise NotImplementedError("overwrite=True with several processes: save to a new path")
    if path.is_symlink() or not (path / _MARKER).is_file():
        raise ValueError(f"{path} is no checkpoint, so overwrite=True does not replace it")
    return True


def _swap(new: pathlib.Path, path: pathlib.Path) -> None:
    """Put a complete checkpoint in the place of another.

    Orbax's own overwriting deletes first. Here both are complete until the last line; a crash
    between the two renames leaves the old one under its other name.
    """
    old = path.with_name(path.name + OLD_SUFFIX)
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    new.rename(path)
    shutil.rmtree(old)


@contextlib.contextmanager
def _clean_on_failure(target: pathlib.Path):
    try:
        yield
    except BaseException:
        shutil.rmtree(target.with_name(target.name + _UNFINISHED), ignore_errors=True)
        raise


def _start(function: Callable[[], None]) -> concurrent.futures.Future:
    executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="qjax-save")
    future = executor.submit(function)
    executor.shutdown(wait=False)
    return future
