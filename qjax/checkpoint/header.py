"""The JSON beside the arrays: what a nested dict of arrays cannot say.

Read as data from a stranger: every field is checked for type and range before it is used, and a
field that is not known is an error.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.checkpoint.tree import check_part
from qjax.core.codebook import CODEBOOKS
from qjax.core.config import BLOCK_SIZES
from qjax.core.qtensor import QTensor

FORMAT_VERSION = 1
STATIC_FIELDS = ("slice_shape", "dtype", "format", "block_size", "contract_axes", "layout")


@dataclasses.dataclass(frozen=True)
class LeafInfo:
    """One array: as stored, so a PRNG key is its uint32 data.

    Attributes:
        dtype: numpy dtype.
        shape: global shape.
        crc32: of the bytes in C order; None where no process holds the whole array.
        prng: name of the PRNG implementation if this is the data of keys.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    crc32: int | None = None
    prng: str | None = None

    def __str__(self) -> str:
        return f"{self.dtype.name}{list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class Header:
    """Everything beside the arrays.

    Attributes:
        kind: "nnx" or "params", what was saved.
        only: "adapters", or None for everything.
        leaves: name -> LeafInfo.
        qtensors: name -> QTensor without arrays.
    """

    kind: str
    only: str | None
    leaves: dict[str, LeafInfo]
    qtensors: dict[str, QTensor]

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "only": self.only,
            "leaves": {name: _leaf_to_json(leaf) for name, leaf in self.leaves.items()},
            "qtensors": {name: _qtensor_to_json(q) for name, q in self.qtensors.items()},
        }

    @classmethod
    def from_json(cls, obj: Any) -> "Header":
        """Check and read the JSON.

        Raises:
            ValueError: a newer format version, or a field that is missing, unknown or out of range;
                the field is named.
        """
        version = _get(obj, "format_version", int, "qjax")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"format version {version} is newer than this qjax reads ({FORMAT_VERSION}): "
                "upgrade qjax"
            )
        if version < 1:
            raise ValueError(f"qjax.format_version must be positive, got {version}")
        _fields(obj, {"format_version", "kind", "only", "leaves", "qtensors"}, "qjax")
        return cls(
            kind=_one_of(obj, "kind", ("nnx", "params"), "qjax"),
            only=_one_of(obj, "only", (None, "adapters"), "qjax"),
            leaves=_named(obj, "leaves", _leaf_from_json),
            qtensors=_named(obj, "qtensors", _qtensor_from_json),
        )


def statics(q: QTensor) -> dict[str, Any]:
    """Return the static fields of a QTensor, dtypes as numpy's."""
    return {name: getattr(q, name) for name in STATIC_FIELDS} | {"dtype": np.dtype(q.dtype)}


def key_dtype(info: LeafInfo) -> Any:
    """Return JAX's dtype of the PRNG keys whose data this describes."""
    data = jax.ShapeDtypeStruct(info.shape, info.dtype)
    wrap = functools.partial(jax.random.wrap_key_data, impl=info.prng)
    return jax.eval_shape(wrap, data).dtype


def _leaf_to_json(leaf: LeafInfo) -> dict[str, Any]:
    obj = {"dtype": leaf.dtype.name, "shape": list(leaf.shape), "crc32": leaf.crc32}
    return obj if leaf.prng is None else {**obj, "prng": leaf.prng}


def _leaf_from_json(obj: Any, where: str) -> LeafInfo:
    _fields(obj, {"dtype", "shape", "crc32", "prng"}, where)
    crc32 = _get(obj, "crc32", (int, type(None)), where)
    if crc32 is not None and not 0 <= crc32 < 2**32:
        raise ValueError(f"{where}.crc32 must be in [0, 2**32), got {crc32}")
    prng = _get(obj, "prng", str, where) if "prng" in obj else None
    info = LeafInfo(_dtype(obj, where), _integers(obj, "shape", where), crc32, prng)
    if prng is not None:
        try:
            key_dtype(info)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}.prng={prng!r} does not fit {info}: {error}") from None
    return info


def _qtensor_to_json(q: QTensor) -> dict[str, Any]:
    fields = statics(q)
    return {
        **fields,
        "dtype": fields["dtype"].name,
        "slice_shape": list(q.slice_shape),
        "contract_axes": list(q.contract_axes),
    }


def _qtensor_from_json(obj: Any, where: str) -> QTensor:
    _fields(obj, set(STATIC_FIELDS), where)
    slice_shape = _integers(obj, "slice_shape", where)
    axes = _integers(obj, "contract_axes", where)
    if not axes or list(axes) != sorted(set(axes)) or axes[-1] >= len(slice_shape):
        raise ValueError(
            f"{where}.contract_axes must be ascending axes of slice_shape={list(slice_shape)}, "
            f"got {list(axes)}"
        )
    if math.prod(slice_shape) == 0:
        raise ValueError(f"{where}.slice_shape must not be empty, got {list(slice_shape)}")
    dtype = _dtype(obj, where)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{where}.dtype must be floating, got {dtype.name}")
    absent: Any = None
    return QTensor(
        packed=absent,
        scales=absent,
        slice_shape=slice_shape,
        dtype=dtype,
        format=_one_of(obj, "format", tuple(CODEBOOKS), where),
        block_size=_one_of(obj, "block_size", BLOCK_SIZES, where),
        contract_axes=axes,
        layout=_one_of(obj, "layout", ("rows", "flat"), where),
    )


# --- reading JSON


def _fields(obj: Any, known: set[str], where: str) -> None:
    if not isinstance(obj, dict):
        raise ValueError(f"{where} must be an object, got {_short(obj)}")
    unknown = sorted(set(obj) - known)
    if unknown:
        raise ValueError(f"{where} has unknown fields {unknown[:5]}")


def _get(obj: Any, key: str, types, where: str) -> Any:
    if not isinstance(obj, dict):
        raise ValueError(f"{where} must be an object, got {_short(obj)}")
    if key not in obj:
        raise ValueError(f"{where}.{key} is missing")
    value = obj[key]
    if not isinstance(value, types) or isinstance(value, bool):
        raise ValueError(f"{where}.{key} has the wrong type: {_short(value)}")
    return value


def _one_of(obj: Any, key: str, values: tuple, where: str) -> Any:
    value = _get(obj, key, tuple({type(v) for v in values}), where)
    if value not in values:
        raise ValueError(f"{where}.{key} must be one of {list(values)}, got {_short(value)}")
    return value


def _integers(obj: Any, key: str, where: str) -> tuple[int, ...]:
    values = _get(obj, key, list, where)
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(
            f"{where}.{key} must hold integers that are not negative, {_short(values)}"
        )
    return tuple(values)


def _dtype(obj: Any, where: str) -> np.dtype:
    name = _get(obj, "dtype", str, where)
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        dtype = None
    # By its full name: numpy would also take "f4" or "f4,f4", and "O" for objects.
    if dtype is None or dtype.name != name or dtype.hasobject or dtype.fields:
        raise ValueError(f"{where}.dtype is no dtype of an array: {_short(name)}")
    return dtype


def _named(obj: Any, key: str, read) -> dict[str, Any]:
    table = _get(obj, key, dict, "qjax")
    for name in table:
        for part in name.split("/") if name else ():
            check_part(part, name)
    return {name: read(value, f"qjax.{key}[{name!r}]") for name, value in table.items()}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
