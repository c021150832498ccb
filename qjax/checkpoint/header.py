"""The JSON beside the arrays: what a nested dict of arrays cannot say.

Read as data from a stranger: every field is checked for type and range before it is used, and a
field that is not known is an error.
"""

import dataclasses
import functools
import json
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.checkpoint.fields import check_fields, dtype_of, entries, get, integers, one_of, short
from qjax.checkpoint.tree import Marks
from qjax.core.codebook import CODEBOOKS
from qjax.core.formats import BUILTIN, Format, format_of, register_format
from qjax.core.qtensor import QTensor
from qjax.nn.linen_box import QuantBox

FORMAT_VERSION = 1
STATIC_FIELDS = ("slice_shape", "dtype", "format", "block_size", "contract_axes", "layout")
_OPTIONAL = ("int8_threshold", "codebook")  # written where there is something to say


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
        marks: QTensors and boxes without arrays, and the adapters' scalings.
    """

    kind: str
    only: str | None
    leaves: dict[str, LeafInfo]
    marks: Marks

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        obj = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "only": self.only,
            "leaves": {name: _leaf_to_json(leaf) for name, leaf in self.leaves.items()},
            "qtensors": {name: _qtensor_to_json(q) for name, q in self.marks.qtensors.items()},
            "boxes": {name: _box_to_json(box, name) for name, box in self.marks.boxes.items()},
            "scalings": self.marks.scalings,
        }
        return {**obj, "crc32": _checksum(obj)}

    @classmethod
    def from_json(cls, obj: Any) -> "Header":
        """Check and read the JSON.

        Raises:
            ValueError: a newer format version, or a field that is missing, unknown or out of range;
                the field is named.
        """
        version = get(obj, "format_version", int, "qjax")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"format version {version} is newer than this qjax reads ({FORMAT_VERSION}): "
                "upgrade qjax"
            )
        if version < 1:
            raise ValueError(f"qjax.format_version must be positive, got {version}")
        crc32 = get(obj, "crc32", int, "qjax")
        obj = {key: value for key, value in obj.items() if key != "crc32"}
        if crc32 != _checksum(obj):
            raise ValueError(f"the qjax metadata are damaged: their CRC-32 is not {crc32}")
        known = {"format_version", "kind", "only", "leaves", "qtensors", "boxes", "scalings"}
        check_fields(obj, known, "qjax")
        return cls(
            kind=one_of(obj, "kind", ("nnx", "params"), "qjax"),
            only=one_of(obj, "only", (None, "adapters"), "qjax"),
            leaves=entries(obj, "leaves", _leaf_from_json),
            marks=Marks(
                entries(obj, "qtensors", _qtensor_from_json),
                entries(obj, "boxes", _box_from_json),
                entries(obj, "scalings", _scaling_from_json),
            ),
        )


def _checksum(obj: Any) -> int:
    return zlib.crc32(json.dumps(obj, sort_keys=True).encode())


def statics(q: QTensor) -> dict[str, Any]:
    """Return the static fields of a QTensor, dtypes as numpy's."""
    fields = {name: getattr(q, name) for name in (*STATIC_FIELDS, "int8_threshold")}
    return fields | {"dtype": np.dtype(q.dtype)}


def key_dtype(info: LeafInfo) -> Any:
    """Return JAX's dtype of the PRNG keys whose data this describes."""
    data = jax.ShapeDtypeStruct(info.shape, info.dtype)
    wrap = functools.partial(jax.random.wrap_key_data, impl=info.prng)
    return jax.eval_shape(wrap, data).dtype


def _leaf_to_json(leaf: LeafInfo) -> dict[str, Any]:
    obj = {"dtype": leaf.dtype.name, "shape": list(leaf.shape), "crc32": leaf.crc32}
    return obj if leaf.prng is None else {**obj, "prng": leaf.prng}


def _leaf_from_json(obj: Any, where: str) -> LeafInfo:
    check_fields(obj, {"dtype", "shape", "crc32", "prng"}, where)
    crc32 = get(obj, "crc32", (int, type(None)), where)
    if crc32 is not None and not 0 <= crc32 < 2**32:
        raise ValueError(f"{where}.crc32 must be in [0, 2**32), got {crc32}")
    prng = get(obj, "prng", str, where) if "prng" in obj else None
    info = LeafInfo(dtype_of(obj, where), integers(obj, "shape", where), crc32, prng)
    if prng is not None:
        try:
            key_dtype(info)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}.prng={prng!r} does not fit {info}: {error}") from None
    return info


def _qtensor_to_json(q: QTensor) -> dict[str, Any]:
    fields = statics(q)
    if q.int8_threshold is None:
        del fields["int8_threshold"]
    if q.format not in BUILTIN:
        fields["codebook"] = q.codebook.tolist()
    return {
        **fields,
        "dtype": fields["dtype"].name,
        "slice_shape": list(q.slice_shape),
        "contract_axes": list(q.contract_axes),
    }


def _qtensor_from_json(obj: Any, where: str) -> QTensor:
    check_fields(obj, {*STATIC_FIELDS, *_OPTIONAL}, where)
    slice_shape = integers(obj, "slice_shape", where)
    axes = integers(obj, "contract_axes", where)
    if not axes or list(axes) != sorted(set(axes)) or axes[-1] >= len(slice_shape):
        raise ValueError(
            f"{where}.contract_axes must be ascending axes of slice_shape={list(slice_shape)}, "
            f"got {list(axes)}"
        )
    if math.prod(slice_shape) == 0:
        raise ValueError(f"{where}.slice_shape must not be empty, got {list(slice_shape)}")
    dtype = dtype_of(obj, where)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{where}.dtype must be floating, got {dtype.name}")
    kind = _format(obj, where)
    k = math.prod(slice_shape[axis] for axis in axes)
    absent: Any = None
    return QTensor(
        packed=absent,
        scales=absent,
        slice_shape=slice_shape,
        dtype=dtype,
        format=kind.name,
        block_size=one_of(obj, "block_size", kind.block_sizes or (k,), where),
        contract_axes=axes,
        layout=one_of(obj, "layout", ("rows", "flat"), where),
        int8_threshold=_threshold(obj, where),
    )


def _format(obj: Any, where: str) -> Format:
    """Return the format, made known first if the file has its table."""
    name = get(obj, "format", str, where)
    if "codebook" not in obj:
        return format_of(one_of(obj, "format", (*BUILTIN, *CODEBOOKS), where))
    try:
        register_format(name, get(obj, "codebook", list, where))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}.codebook: {error}") from None
    return format_of(name)


def _threshold(obj: Any, where: str) -> float | None:
    if "int8_threshold" not in obj:
        return None
    value = get(obj, "int8_threshold", float, where)
    if not 0 < value < math.inf or obj["format"] != "int8":
        raise ValueError(f"{where}.int8_threshold must be positive, with int8, got {value}")
    return value


def _box_to_json(box: QuantBox, name: str) -> dict[str, Any]:
    if not _are_names(box.names):
        raise TypeError(f"{name}: names of axes must be strings, got {box.names}")
    return {
        "dropout": float(box.dropout),
        "names": None if box.names is None else list(box.names),
        "compute_dtype": None if box.compute_dtype is None else jnp.dtype(box.compute_dtype).name,
        **({"stack_axes": list(box.stack_axes)} if box.stack_axes else {}),
    }


def _box_from_json(obj: Any, where: str) -> QuantBox:
    check_fields(obj, {"dropout", "names", "compute_dtype", "stack_axes"}, where)
    dropout = get(obj, "dropout", (int, float), where)
    if not 0 <= dropout < 1:
        raise ValueError(f"{where}.dropout must be in [0, 1), got {dropout}")
    names = get(obj, "names", (list, type(None)), where)
    if not _are_names(names):
        raise ValueError(f"{where}.names must hold strings, got {short(names)}")
    if names is not None:
        names = tuple(tuple(axis) if isinstance(axis, list) else axis for axis in names)
    compute_dtype = get(obj, "compute_dtype", (str, type(None)), where)
    if compute_dtype is not None:
        compute_dtype = dtype_of(obj, where, "compute_dtype")
    stack_axes = integers(obj, "stack_axes", where) if "stack_axes" in obj else ()
    absent: Any = None
    return QuantBox(
        absent, dropout=dropout, names=names, compute_dtype=compute_dtype, stack_axes=stack_axes
    )


def _are_names(names: Any) -> bool:
    """Return whether these can be a kernel's names: for each axis None, a string, or several."""
    axes = [axis if isinstance(axis, tuple | list) else (axis or "",) for axis in names or ()]
    return all(isinstance(name, str) for axis in axes for name in axis)


def _scaling_from_json(obj: Any, where: str) -> float:
    if not isinstance(obj, float) or not 0 < obj < math.inf:
        raise ValueError(f"{where} must be a positive number, got {short(obj)}")
    return obj
