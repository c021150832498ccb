"""The slab of x of a block of `mosaic_decode`, as the right operands of its products.

A fragment is 4 words, 8 consecutive k of a row of x: lane q of a quad has bytes 4q..4q+3 of each 16
of the weight, so both sides have the same order of K. A warp keeps those of its panels in registers
or, where they are too many, the block keeps x in shared memory.
"""

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels.matmul.config import PANEL, DecodeTiles
from pallas_kernels.matmul.decode_layout import Layout, Share
from pallas_kernels.matmul.mosaic_panels import CHUNK, CHUNKS
from pallas_kernels.matmul.problem import Problem

Fragment = list[mg.Int]


class X:
    """One thread's view of it."""

    def __init__(self, problem: Problem, tiles: DecodeTiles, layout: Layout, share: Share, source):
        self.problem, self.tiles, self.layout, self.share = problem, tiles, layout, share
        self.source = mem.global_address(source)

    def place(self, shared: mg.Value, warp: mg.Int, lane: mg.Int) -> None:
        """Give the memory for it, and who this thread is."""
        self.shared, self.warp = mem.shared_address(shared), warp
        self.group, self.quad = lane >> 2, lane & 3

    def panel(self, step: int) -> mg.Int:
        """This warp's panel within the slab; may lie past its end."""
        return self.warp + step * self.tiles.warps

    def load(self) -> list[Fragment]:
        """Start to load x, for `store`."""
        if self.tiles.shared_x:
            return [self._load(row, k) for row, k in self._places()]
        parts = []
        for step in range(self.layout.steps):
            for column in range(self.layout.columns):
                for chunk in range(CHUNKS):
                    parts.append(self._load(self.group + 8 * column, self._k(step, chunk)))
        return parts

    def store(self, parts: list[Fragment]) -> list[Fragment]:
        """Keep what was loaded; the block synchronizes, and gives the result to `fragment`."""
        if not self.tiles.shared_x:
            return parts
        for (row, k), words in zip(self._places(), parts):
            with mg.when(row < self.problem.m):
                mem.store_words(self._row(row) + (k << 1), words)
        return []

    def fragment(self, kept: list[Fragment], step: int, chunk: int, column: int) -> Fragment:
        """That of a panel of this warp, 32 k of it and 8 rows of x."""
        if kept:
            return kept[(step * self.layout.columns + column) * CHUNKS + chunk]
        row = (self.group + 8 * column).at_most(self.problem.m - 1)  # past the end any will do
        return mem.load_words(self._row(row) + (self._k(step, chunk) << 1))

    def _row(self, row: mg.Int) -> mg.Int:
        return self.shared + row * self.layout.x_row

    def _k(self, step: int, chunk: int) -> mg.Int:
        """Where the fragment begins, from the slab's first k."""
        return self.panel(step) * PANEL + (self.quad << 3) + chunk * CHUNK

    def _places(self) -> list[tuple[mg.Int, mg.Int]]:
        """(row, k) of each fragment that this thread brings; rows may lie past the end."""
        eights = (self.layout.x_row - 16) // 16
        count, threads = self.problem.m * eights, self.tiles.warps * mg.WARP
        places = [mg.thread_index() + first for first in range(0, count, threads)]
        return [(place // eights, place % eights << 3) for place in places]

    def _load(self, row: mg.Int, k: mg.Int) -> Fragment:
        """Start to load a fragment; zeros past the end of x or of the slab."""
        place = self.share.first_panel * PANEL + k
        exists = mg.both(row < self.problem.m, place < self.problem.k)
        exists = mg.both(exists, k < self.share.panels * PANEL)
        offset = row * self.problem.k + place
        return mem.load_words_where(exists, self.source + (offset << 1).wide())
