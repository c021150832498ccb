"""The term of an adapter, hidden @ B.T, in the sums of `mosaic_decode`: an element of y a thread.

The threads that sum up a tile's partials add it, so that the others go on to the next tile.
"""

import math

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels.matmul.mosaic_low_rank import section
from pallas_kernels.matmul.problem import Operands, Problem

ROWS = 16  # of a tile
SECTOR = 32  # bytes
EARLY = 16  # of the rank, for which there are registers while a tile's partials are summed

Loaded = list[tuple]  # parts of a row of hidden and of one of B; to look at one is to wait for it


class RowTerm:
    """One thread's view of an adapter."""

    def __init__(self, problem: Problem, refs: Operands, layer: mg.Int):
        self.problem, self.step = problem, math.gcd(problem.rank, 8)
        self.hidden, self.b = (mem.global_address(refs.adapter[i]) for i in range(2))
        self.b = self.b + layer.wide() * (2 * problem.n * problem.rank)

    def prefetch(self, row: mg.Int, lane: mg.Int) -> None:
        """By a warp: bring B of the tile of a row near; later, it would queue behind panels."""
        first, size = row * (2 * self.problem.rank), 2 * self.problem.rank
        for start in range(0, ROWS * size, SECTOR * mg.WARP):
            place = lane * SECTOR + start
            inside = mg.both(place < ROWS * size, first + place < self.problem.n * size)
            with mg.when(inside):
                mem.prefetch(self.b + (first + place).wide())

    def load(self, column: mg.Int, row: mg.Int, first: int, end: int) -> Loaded:
        """Start to load what an element of y needs, for a part of the rank."""
        p, width = self.problem, self.step
        # A place past the end is of no element: any will do.
        column, row = column.at_most(p.m - 1), row.at_most(p.n - 1)
        pitch = len(p.sections) * p.rank
        hidden = column * pitch + section(p, row) * p.rank
        sources = (self.hidden, hidden), (self.b, row * p.rank)
        return [
            tuple(
                mem.load_halves(base + (place + k << 1).wide(), width, p.dtype)
                for base, place in sources
            )
            for k in range(first, end, width)
        ]

    def add(self, value, parts: Loaded):
        """Add the product of what was loaded."""
        for hidden, b in parts:
            for one, other in zip(*(mg.widen(part, self.step) for part in (hidden, b))):
                value = mg.fma(one, other, value)
        return value
