"""From a tile's sums in registers to y, in `mosaic_mid`.

A thread has the 4 sums of 8 columns that its team and its block keep, of each stripe (`Sums`).
"""

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels.matmul.mid_layout import THREADS, Layout
from pallas_kernels.matmul.problem import Operands, Problem

STAGED = 1 << 12  # bytes of a stripe's results: 16 bits for 512 threads' 4 sums


class Result:
    """One thread's view of it. `rank` is the block's in its cluster; `warp` is uniform."""

    def __init__(self, problem: Problem, layout: Layout, refs: Operands, out, scratch, rank, warp):
        self.problem, self.layout, self.rank = problem, layout, rank
        self.thread = mg.thread_index()
        self.lane = self.thread & (mg.WARP - 1)
        self.team, self.team_warp = warp // layout.team_warps, warp % layout.team_warps
        self.chunks = layout.rows // 8  # 16 bytes of a staged column
        self.out = mem.global_address(out)
        self.staging = mem.shared_address(scratch[layout.staged])
        self.residual = [mem.global_address(ref) for ref in refs.residual]

    def store(self, kept: list[list], tile: mg.Int) -> None:
        """Write a tile's columns to y."""
        kept = self.add_residual(kept, tile)
        if self.problem.n % 8:
            self.store_elements(kept, tile)
            return
        at_once = self.layout.staging // STAGED
        for first in range(0, len(kept), at_once):
            mg.sync_block()  # what was there before is read
            some = kept[first : first + at_once]
            self.stage(some)
            mg.sync_block()
            self.store_lines(first, len(some), tile)

    def store_lines(self, first: int, count: int, tile: mg.Int) -> None:
        """Write so many staged stripes, from the block's stripe `first` on, 8 rows a thread."""
        m, n = self.problem.m, self.problem.n
        stripe, blocks = self.layout.stripe, self.layout.cluster
        chunk = self.thread & (self.chunks - 1)
        row = tile * self.layout.rows + (chunk << 3)
        lines = min(count * stripe, m - first * stripe * blocks)
        for start in range(0, lines, THREADS // self.chunks):
            line = self.thread // self.chunks + start
            column = ((line // stripe + first) * blocks + self.rank) * stripe + line % stripe
            inside = mg.both(column < m, row < n)
            with mg.when(mg.both(line < count * stripe, inside)):
                words = mem.load_words(self.staged(line, chunk))
                mem.store_words(self.out + (column * n + row).wide() * 2, words)

    def stage(self, kept: list[list]) -> None:
        """Put columns into shared memory, transposed: two stripes a matrix store."""
        dtype, matrix, stripe = self.problem.dtype, self.lane >> 3, self.layout.stripe
        column = (self.team << 3) + (self.lane & 7)
        chunk = (self.team_warp << 1) + (matrix & 1)
        for first in range(0, len(kept), 2):
            two = kept[first], kept[min(first + 1, len(kept) - 1)]  # the same twice at the end
            words = [mg.pack_pair(*four[i : i + 2], dtype) for four in two for i in (0, 2)]
            step = stripe if len(kept) - first > 1 else 0
            place = column + (first * stripe) + (matrix >> 1) * step
            mem.store_matrices_transposed(self.staged(place, chunk), words)

    def staged(self, column: mg.Int, chunk: mg.Int) -> mg.Int:
        """Where 8 rows of a column are; columns are swizzled against bank conflicts."""
        return self.staging + (column * self.chunks + (chunk ^ (column & 7)) << 4)

    def first_place(self, tile: mg.Int) -> tuple[mg.Int, mg.Int]:
        """The row and the column of the thread's first sum of its first stripe."""
        row = tile * self.layout.rows + (self.team_warp << 4) + (self.lane >> 2)
        column = self.rank * self.layout.stripe + (self.team << 3)
        return row, column + ((self.lane & 3) << 1)

    def offsets(self, stripe: int) -> list[tuple[int, int]]:
        """Rows and columns from there to each of the 4 sums of a stripe that is kept."""
        right = stripe * self.layout.stripe * self.layout.cluster
        return [(8 * (r // 2), right + r % 2) for r in range(4)]

    def add_residual(self, kept: list[list], tile: mg.Int) -> list[list]:
        """Add to the columns that are kept what is added to y; past its end nothing is."""
        m, n = self.problem.m, self.problem.n
        row, column = self.first_place(tile)
        for source in self.residual:
            for i, four in enumerate(kept):
                for r, (down, right) in enumerate(self.offsets(i)):
                    place = (column + right).at_most(m - 1) * n + (row + down).at_most(n - 1)
                    value = mem.load_half(source + (place << 1).wide(), self.problem.dtype)
                    four[r] = mg.add(four[r], value)
        return kept

    def store_elements(self, kept: list[list], tile: mg.Int) -> None:
        """Write a tile's columns one value at a time."""
        m, n, dtype = self.problem.m, self.problem.n, self.problem.dtype
        row, column = self.first_place(tile)
        target = self.out + (column * n + row << 1).wide()
        for i, four in enumerate(kept):
            for value, (down, right) in zip(four, self.offsets(i), strict=True):
                with mg.when(mg.both(column + right < m, row + down < n)):
                    mem.store(target + 2 * (right * n + down), mg.round_to(value, dtype))
