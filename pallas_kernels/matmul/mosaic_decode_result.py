"""From the sums of the warps of `mosaic_decode` to y: over the warps, then over the slabs of K."""

from jax.extend.mlir import ir

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels.matmul.config import DecodeTiles
from pallas_kernels.matmul.decode_layout import COLUMN, Layout, Share
from pallas_kernels.matmul.mosaic_panels import ROWS
from pallas_kernels.matmul.mosaic_slabs import SlabSums
from pallas_kernels.matmul.mosaic_terms import Terms
from pallas_kernels.matmul.problem import Problem


class Result:
    """One thread's view of it. Warpgroups take turns at the tiles while the others go on."""

    def __init__(self, problem: Problem, tiles: DecodeTiles, layout: Layout, share: Share):
        self.problem, self.tiles, self.layout, self.share = problem, tiles, layout, share
        self.thread = mg.thread_index() % mg.WARPGROUP

    def place(self, out: ir.Value, terms: Terms, warp: mg.Int, lane: mg.Int, scratch: dict) -> None:
        """Give y, what is added to it, who this thread is, and the memory for sums."""
        self.out, self.terms, self.warp, self.lane = mem.global_address(out), terms, warp, lane
        self.partials = mem.shared_address(scratch["partials"])
        self.slabs = None
        if self.layout.slabs > 1:
            self.slabs = SlabSums(self.layout.slab, self.share.slab, scratch)

    def initialize(self) -> None:
        """By all threads; before `wait` the block synchronizes."""
        if self.slabs:
            with mg.when(mg.thread_index().equals(0)):
                self.slabs.initialize()
            mg.arrive_at_cluster()

    def wait(self) -> None:
        """By all threads, before the first sum: wait until other blocks can be sent theirs."""
        if self.slabs:
            mg.await_cluster()

    def put(self, i: mg.Int, acc: list[list]) -> None:
        """By each warp: leave its sums of tile i, 4 floats for each group of 8 rows of x."""
        group, quad = self.lane >> 2, self.lane & 3
        buffer = (i & 1) * self.tiles.warps + self.warp
        base = self.partials + buffer * (4 * self.layout.partial)
        base = base + ((quad * (2 * COLUMN) + group) << 2)
        for column, values in enumerate(acc):
            for r, value in enumerate(values):
                offset = (8 * column + r % 2) * COLUMN + 8 * (r // 2)
                mem.store(base + 4 * offset, value)

    def take(self, i: mg.Int) -> None:
        """After a barrier of the block: add up tile i; of several slabs, write the one before."""
        with mg.when(self._in_turn(i)):
            self._reduce(i)
        if self.slabs:
            with mg.when(mg.both(mg.Int(0) < i, self._finishes(i - 1))):
                self._finish(self.slabs, i - 1)

    def end(self, count: mg.Int) -> None:
        """After the last of `count` tiles."""
        if self.slabs:
            with mg.when(self._finishes(count - 1)):
                self._finish(self.slabs, count - 1)

    def _in_turn(self, i: mg.Int) -> mg.Value:
        """Whether tile i is for this warpgroup."""
        return (self.warp >> 2).equals(i % (self.tiles.warps // 4))

    def _finishes(self, i: mg.Int) -> mg.Value:
        return mg.both(self._in_turn(i), self.share.owns(i))

    def _reduce(self, i: mg.Int) -> None:
        """Add up the warps' sums of tile i; write the result, or send it to who will."""
        if self.slabs:
            with mg.when(mg.both(self.share.owns(i), self.thread.equals(0))):
                self.slabs.expect(i)
        for index in self._elements():
            with mg.when(index < ROWS * self.problem.m):
                values = self._load_partials(i, index)
                if self.slabs:
                    self.slabs.send(i, index, mg.tree_sum(values), self.share.owner(i))
                else:
                    self._write(i, index, values)

    def _finish(self, slabs: SlabSums, i: mg.Int) -> None:
        """Add up the slabs' sums of tile i, when they have come, and write the result."""
        slabs.wait(i)
        for index in self._elements():
            with mg.when(index < ROWS * self.problem.m):
                self._write(i, index, slabs.load(i, index))

    def _elements(self) -> list[mg.Int]:
        """This thread's share of a tile of y; may lie past its end."""
        return [self.thread + first for first in range(0, ROWS * self.problem.m, mg.WARPGROUP)]

    def _load_partials(self, i: mg.Int, index: mg.Int) -> list:
        """What the warps have of an element of tile i."""
        stride, column, tile_row = 4 * self.layout.partial, index // ROWS, index % ROWS
        base = self.partials + (i & 1) * (self.tiles.warps * stride)
        base = base + ((column * COLUMN + tile_row) << 2)
        return [mem.load_float(base + warp * stride) for warp in range(self.tiles.warps)]

    def _write(self, i: mg.Int, index: mg.Int, values: list) -> None:
        """Write an element of tile i, of which `values` are parts, if it is in y."""
        column, tile_row = index // ROWS, index % ROWS
        row = self.share.row(i) + tile_row
        with mg.when(row < self.problem.n):
            values = values + self.terms.load_residual(i, column, tile_row, row)
            value = self.terms.add(i, mg.tree_sum(values), column, tile_row, row)
            place = (column * self.problem.n + row).wide()
            mem.store(self.out + place * 2, mg.round_to(value, self.problem.dtype))
