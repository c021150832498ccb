"""Reading the fields of JSON that may be wrong in any way; each error names its field."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.checkpoint.tree import check_part


def check_fields(obj: Any, known: set[str], where: str) -> None:
    """Raise ValueError unless obj is an object without fields other than these."""
    if not isinstance(obj, dict):
        raise ValueError(f"{where} must be an object, got {short(obj)}")
    unknown = sorted(set(obj) - known)
    if unknown:
        raise ValueError(f"{where} has unknown fields {unknown[:5]}")


def get(obj: Any, key: str, types: Any, where: str) -> Any:
    """Return a field of one of the types; a bool is no int."""
    if not isinstance(obj, dict):
        raise ValueError(f"{where} must be an object, got {short(obj)}")
    if key not in obj:
        raise ValueError(f"{where}.{key} is missing")
    value = obj[key]
    if not isinstance(value, types) or isinstance(value, bool):
        raise ValueError(f"{where}.{key} has the wrong type: {short(value)}")
    return value


def one_of(obj: Any, key: str, values: tuple, where: str) -> Any:
    """Return a field that is one of the values."""
    value = get(obj, key, tuple({type(v) for v in values}), where)
    if value not in values:
        raise ValueError(f"{where}.{key} must be one of {list(values)}, got {short(value)}")
    return value


def integers(obj: Any, key: str, where: str) -> tuple[int, ...]:
    """Return a list of integers from 0 up."""
    values = get(obj, key, list, where)
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{where}.{key} must hold integers that are not negative, {short(values)}")
    return tuple(values)


def dtype_of(obj: Any, where: str, key: str = "dtype") -> np.dtype:
    """Return the dtype that a field names."""
    name = get(obj, key, str, where)
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        dtype = None
    # By its full name: numpy would also take "f4" or "f4,f4", and "O" for objects.
    if dtype is None or dtype.name != name or dtype.hasobject or dtype.fields:
        raise ValueError(f"{where}.{key} is no dtype of an array: {short(name)}")
    return dtype


def entries(obj: Any, key: str, read: Callable[[Any, str], Any]) -> dict[str, Any]:
    """Return an object whose keys are names of leaves, its values read by `read`."""
    table = get(obj, key, dict, "qjax")
    for name in table:
        for part in name.split("/") if name else ():
            check_part(part, name)
    return {name: read(value, f"qjax.{key}[{name!r}]") for name, value in table.items()}


def short(value: Any) -> str:
    """Return a value for a message."""
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
