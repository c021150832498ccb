"""The head of a GGUF file, walked once to see that what it counts is there.

The `gguf` package takes the counts as they are: a broken one has it loop for ever. Source: ggml's
docs/gguf.md.
"""

import mmap
import struct
from pathlib import Path

_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of plain values
_MAX_DIMS = 8  # ggml has 4


def check_header(path: Path) -> None:
    """Raise ValueError unless the head is whole."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Head(data).walk()


class _Head:
    def __init__(self, data: mmap.mmap):
        self._data, self._at, self._order = data, 4, "<"

    def walk(self) -> None:
        version = self._data[4:8]
        if version[:2] == b"\0\0":  # a small number in the order of the other kind of machine
            self._order = ">"
        self._number("I")
        tensors, pairs = self._number("Q"), self._number("Q")
        for _ in range(pairs):
            self._string()
            self._value(self._number("I"))
        for _ in range(tensors):
            self._string()
            dims = self._number("I")
            if dims > _MAX_DIMS:
                raise ValueError(f"a tensor has {dims} dimensions")
            self._skip(8 * dims + 4 + 8)  # sizes, type, offset

    def _value(self, kind: int, depth: int = 0) -> None:
        if kind in _SIZES:
            self._skip(_SIZES[kind])
        elif kind == _STRING:
            self._string()
        elif kind == _ARRAY and depth < 2:
            item, count = self._number("I"), self._number("Q")
            if item in _SIZES:
                self._skip(_SIZES[item] * count)
                return
            for _ in range(count):  # each takes bytes, so that this ends
                self._value(item, depth + 1)
        else:
            raise ValueError(f"a value is of type {kind}")

    def _string(self) -> None:
        self._skip(self._number("Q"))

    def _number(self, kind: str) -> int:
        start = self._at
        self._skip(struct.calcsize("<" + kind))
        return struct.unpack(self._order + kind, self._data[start : self._at])[0]

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self._data):
            raise ValueError("it ends in its head")
