"""What ran for each weight: a record that `qjax.report` switches on while it traces a call.

It works on Python values at trace time alone, so it costs nothing in compiled code.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple


class Record(NamedTuple):
    """One use of a weight."""

    path: str | None  # "/"-joined, None where no layer said
    op: str  # "matmul", "einsum", "take" or "decode"
    detail: str  # the implementation, or why the whole weight is decoded


_records: ContextVar[list[Record] | None] = ContextVar("qjax_trace_records", default=None)
_path: ContextVar[str | None] = ContextVar("qjax_trace_path", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[Record]]:
    """Collect the records of everything traced inside."""
    records: list[Record] = []
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)


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


def record(op: str, detail: str) -> None:
    """Note a use of the current weight, if anybody listens."""
    records = _records.get()
    if records is not None:
        records.append(Record(_path.get(), op, detail))
