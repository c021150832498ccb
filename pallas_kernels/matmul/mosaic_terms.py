"""What `mosaic_decode` adds to a tile of y: the term of an adapter, hidden @ B.T, and a residual.

They come to shared memory with the tile's panels, in the same group of copies. Memory answers in
order: loaded at the end of a tile, they would wait for the panels of the next. The threads that sum
up a tile's partials add them, and the others go on.
"""

import math

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels.matmul.config import DecodeTiles
from pallas_kernels.matmul.mosaic_low_rank import section
from pallas_kernels.matmul.mosaic_panels import ROWS
from pallas_kernels.matmul.problem import Operands, Problem


class TermLayout:
    """Sizes in bytes, and where they lie: hidden whole, then slots with B and the residual."""

    def __init__(self, problem: Problem, tiles: DecodeTiles):
        # One more is read and one is written meanwhile; with several slabs, one a tile later.
        self.slots = tiles.stages + 2 + (tiles.slabs > 1)
        self.hidden_row = 2 * len(problem.sections) * problem.rank
        self.hidden = -(-problem.m * self.hidden_row // 16) * 16
        self.b = 2 * ROWS * problem.rank
        staged = problem.residual and problem.n % 2 == 0  # a copy takes 4 bytes at least
        self.residual = 2 * ROWS * problem.m if staged else 0
        self.slot = self.b + self.residual

    def scratch(self) -> dict:
        """Shared memory of a block, by name."""
        words = (self.hidden + self.slots * self.slot) // 4
        return {"terms": plgpu.SMEM((words,), jnp.int32)} if words else {}


class Terms:
    """One thread's view of them."""

    def __init__(self, problem: Problem, layout: TermLayout, refs: Operands, layer, scratch):
        self.problem, self.layout = problem, layout
        self.lane = mg.thread_index() & (mg.WARP - 1)
        self.residual = [mem.global_address(ref) for ref in refs.residual]
        if problem.rank:
            self.hidden, self.b = (mem.global_address(ref) for ref in refs.adapter)
            self.b = self.b + layer.wide() * (2 * problem.n * problem.rank)
        if "terms" in scratch:
            self.base = mem.shared_address(scratch["terms"])

    def slot(self, i: mg.Int) -> mg.Int:
        """Where what tile i needs is."""
        return self.base + (i % self.layout.slots * self.layout.slot + self.layout.hidden)

    def copy_hidden(self) -> None:
        """By one warp, before its first panel: start to copy hidden."""
        if self.problem.rank:
            size = self.problem.m * self.layout.hidden_row
            self.copy_run(self.base, self.hidden, size, mg.Int(size))

    def copy(self, i: mg.Int, row: mg.Int) -> None:
        """By one warp, before its panel of tile i: start to copy what the rows from `row` need."""
        p, layout = self.problem, self.layout
        if p.rank:
            start = row * (2 * p.rank)
            end = mg.Int(2 * p.n * p.rank) - start
            self.copy_run(self.slot(i), self.b + start.wide(), layout.b, end)
        if layout.residual:
            width = 2 * math.gcd(p.n, 8)
            parts = 2 * ROWS // width
            for first in range(0, p.m * parts, mg.WARP):
                index = self.lane + first
                column, place = index // parts, row * 2 + index % parts * width
                target = self.slot(i) + layout.b + index * width
                with mg.when(mg.both(column < p.m, place < 2 * p.n)):
                    source = self.residual[0] + (column * (2 * p.n)).wide() + place.wide()
                    mem.copy_async(target, source, width)

    def copy_run(self, target: mg.Int, source: mg.Int, size: int, end: mg.Int) -> None:
        """Start to copy consecutive bytes, those before `end`."""
        width = 2 * math.gcd(self.problem.rank, 8)
        for first in range(0, size, width * mg.WARP):
            place = self.lane * width + first
            with mg.when(place < end.at_most(size)):
                mem.copy_async(target + place, source + place.wide(), width)

    def add(self, i: mg.Int, value, column: mg.Int, tile_row: mg.Int, row: mg.Int):
        """Add them to the sum that is y[column, row], an element of tile i."""
        p, step = self.problem, math.gcd(self.problem.rank, 8)
        for k in range(0, p.rank, step):
            hidden = column * self.layout.hidden_row + (section(p, row) * p.rank + k << 1)
            b = tile_row * (2 * p.rank) + 2 * k
            pair = [
                mg.widen(mem.load_halves(address, step, p.dtype), step)
                for address in (self.base + hidden, self.slot(i) + b)
            ]
            for one, other in zip(*pair):
                value = mg.fma(one, other, value)
        return value

    def load_residual(self, i: mg.Int, column: mg.Int, tile_row: mg.Int, row: mg.Int) -> list:
        """The residual's element, if there is one."""
        if self.layout.residual:
            place = self.slot(i) + self.layout.b + (column * ROWS + tile_row << 1)
            return [mem.load_half(place, self.problem.dtype)]
        place = (column * self.problem.n + row << 1).wide()
        return [mem.load_half(source + place, self.problem.dtype) for source in self.residual]
