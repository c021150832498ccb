"""What ran for each weight: a record that `qjax.report` switches on while it traces a call.

It works on Python values at trace time alone, so it costs nothing in compiled code. Calibration
watches the activations in the same way, while a model runs.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import NamedTuple

import jax

from qjax.core.qtensor import QTensor


class Record(NamedTuple):
    """One use of a weight."""

    path: str | None  # "/"-joined, None where no layer said
    op: str  # "matmul", "einsum", "take" or "decode"
    detail: str  # the implementation, or why the whole weight is decoded


_records: ContextVar[list[Record] | None] = ContextVar("qjax_trace_records", default=None)
_names: ContextVar[Mapping[int, str]] = ContextVar("qjax_trace_names", default=MappingProxyType({}))
_observer: ContextVar[Callable[[str, jax.Array], None] | None] = ContextVar(
    "qjax_trace_observer", default=None
)
_path: ContextVar[str | None] = ContextVar("qjax_trace_path", default=None)


@contextlib.contextmanager
def recording(names: Mapping[int, str] = MappingProxyType({})) -> Iterator[list[Record]]:
    """Collect the records of everything traced inside.

    Args:
        names: the path of a weight by the id of its packed array, for ops outside any layer.
    """
    records: list[Record] = []
    tokens = _records.set(records), _names.set(names)
    try:
        yield records
    finally:
        _records.reset(tokens[0])
        _names.reset(tokens[1])


@contextlib.contextmanager
def observing(
    observer: Callable[[str, jax.Array], None], names: Mapping[int, str] = MappingProxyType({})
) -> Iterator[None]:
    """Call `observer(path, x)` with what multiplies each weight inside: x [*batch, M, K].

    Args:
        observer: told of weights whose path is known.
        names: as in `recording`.
    """
    tokens = _observer.set(observer), _names.set(names)
    try:
        yield
    finally:
        _observer.reset(tokens[0])
        _names.reset(tokens[1])


@contextlib.contextmanager
def leaf(path: str | None) -> Iterator[None]:
    """Attribute what is recorded inside to the weight at `path`; None leaves it as it is."""
    if path is None:
        yield
        return
    token = _path.set(path)
    try:
        yield
    finally:
        _path.reset(token)


def is_recording() -> bool:
    """Whether anybody listens."""
    return _records.get() is not None


def is_watched() -> bool:
    """Whether anybody listens or looks at what is multiplied."""
    return is_recording() or _observer.get() is not None


def record(op: str, detail: str, q: QTensor | None = None) -> None:
    """Note a use of the current weight, or else of q if it has a name, if anybody listens."""
    records = _records.get()
    if records is not None:
        records.append(Record(_path_of(q), op, detail))


def observe(x: jax.Array, q: QTensor, batch_ndim: int | None = None) -> None:
    """Show what multiplies the current weight, as [*batch, M, K], if anybody watches."""
    observer, path = _observer.get(), _path_of(q)
    if observer is not None and path is not None:
        k = math.prod(q.contract_shape)
        observer(path, x.reshape(*q.batch_shape[:batch_ndim], -1, k))


def _path_of(q: QTensor | None) -> str | None:
    path = _path.get()
    if path is None and q is not None:
        path = _names.get().get(id(q.packed))
    return path
