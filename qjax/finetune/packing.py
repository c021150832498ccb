"""Examples to rows of one length: several in a row, apart by segment ids, so little is padding."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from qjax.finetune.records import Example


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows of tokens, ready to train on.

    Attributes:
        ids: int32 [N, T].
        targets: int32 [N, T], the token after each of `ids`.
        weights: float32 [N, T], 1 where the target is trained.
        segments: int32 [N, T], the number of the example in its row from 1; 0 on padding.
        cut: how many examples were longer than a row, and lost their end.
        empty: how many had nothing to train within a row, and were left out.
    """

    ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    segments: np.ndarray
    cut: int
    empty: int

    def batch(self, step: int, size: int, seed: int) -> tuple[np.ndarray, ...]:
        """Return the arrays of a step's rows: a function of the step, so that a run can go on.

        Each epoch goes over all rows in an order of its own; a batch may reach into the next.
        """
        first, rows = step * size, []
        while len(rows) < size:
            epoch, begin = divmod(first + len(rows), len(self.ids))
            order = np.random.default_rng([seed, epoch]).permutation(len(self.ids))
            rows += order[begin : begin + size - len(rows)].tolist()
        return tuple(a[rows] for a in (self.ids, self.targets, self.weights, self.segments))


def pack(examples: Sequence[Example], length: int, *, together: bool = True) -> Packed:
    """Put examples into rows, longest first, each into the first row with room.

    Args:
        examples: of two tokens or more, or nothing of them can be trained.
        length: T.
        together: several in a row; False: one in each.

    Raises:
        ValueError: no example has anything to train on.
    """
    cut = sum(len(e.ids) - 1 > length for e in examples)
    fitting = [Example(e.ids[: length + 1], e.trained[: length + 1]) for e in examples]
    useful = [e for e in fitting if any(e.trained[1:])]
    if not useful:
        raise ValueError(f"no example has a token to train on within {length} tokens")
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(useful, key=lambda e: -len(e.ids)):  # stable: the file's order decides
        size = len(example.ids) - 1
        fits = (i for i, free in enumerate(room) if free >= size)
        place = next(fits, None) if together else None
        if place is None:
            place = len(rows)
            rows.append([])
            room.append(length)
        rows[place].append(example)
        room[place] -= size
    return _arrays(rows, length, cut, len(examples) - len(useful))


def _arrays(rows: list[list[Example]], length: int, cut: int, empty: int) -> Packed:
    shape = (len(rows), length)
    ids, targets, segments = (np.zeros(shape, np.int32) for _ in range(3))
    weights = np.zeros(shape, np.float32)
    for r, row in enumerate(rows):
        begin = 0
        for number, example in enumerate(row, 1):
            at = slice(begin, begin := begin + len(example.ids) - 1)
            ids[r, at], targets[r, at] = example.ids[:-1], example.ids[1:]
            weights[r, at], segments[r, at] = example.trained[1:], number
    return Packed(ids, targets, weights, segments, cut, empty)
