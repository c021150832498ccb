"""From a tile's sums in registers to y, in `mosaic_mid`.

A thread has 4 sums of each 8 columns, of which a team finishes every other. Of a tile that several
blocks share, one leaves its sums in device memory; the block with the start adds them, in order.
"""

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels.matmul.config import MID_ROWS as ROWS
from pallas_kernels.matmul.mid_layout import PAIR, PAIR_BYTES, THREADS, WARPS, Layout
from pallas_kernels.matmul.mosaic_x import TEAM
from pallas_kernels.matmul.problem import Operands, Problem

TEAM_THREADS = TEAM * mg.WARP
CHUNKS = ROWS // 8  # 16 bytes of a staged column


class Result:
    """One thread's view of it. `share` is the block's; `warp` is uniform."""

    def __init__(
        self, problem: Problem, layout: Layout, refs: Operands, out, sums, scratch, share, warp
    ):
        self.problem, self.layout, self.share, self.warp = problem, layout, share, warp
        self.thread = mg.thread_index()
        self.lane = self.thread & (mg.WARP - 1)
        self.team, self.warp_row = self.warp // TEAM, self.warp % TEAM * 16
        self.out, self.staging = mem.global_address(out), mem.shared_address(scratch["staging"])
        if layout.splits:
            self.sums, self.marks = (mem.global_address(ref) for ref in sums)
            self.tag = mem.grid_tag()
        self.residual = [mem.global_address(ref) for ref in refs.residual]

    def exchange(self, acc: list) -> list[list]:
        """Sum the teams' halves of k; each team keeps 8 columns of each pair."""
        layout, is_first = self.layout, self.team.equals(0)
        thread = self.thread & (TEAM_THREADS - 1)

        def place(team: mg.Int, pair: int) -> mg.Int:
            number = team * layout.pairs_at_once + pair % layout.pairs_at_once
            return self.staging + (number * TEAM_THREADS + thread << 4)

        kept = []
        for first in range(0, layout.pairs, layout.pairs_at_once):
            pairs = range(first, min(first + layout.pairs_at_once, layout.pairs))
            mg.sync_block()  # what was staged before is read
            own = []
            for pair in pairs:
                even, odd = (acc[start:][:4] for start in (8 * pair, 8 * pair + 4))
                odd = odd or [mg.zero()] * 4
                own.append([mg.select_float(is_first, e, o) for e, o in zip(even, odd)])
                other = [mg.select_float(is_first, o, e) for e, o in zip(even, odd)]
                mem.store_floats(place(self.team, pair), other)
            mg.sync_block()
            kept += _add(own, [mem.load_floats(place(self.team ^ 1, pair), 4) for pair in pairs])
        return kept

    def leave_sums(self, acc: list) -> None:
        """Leave the sums of a tile's later part to the block that has its start."""
        for i, pair in enumerate(self.exchange(acc)):
            mem.store_floats(self.sum_place(self.share, i), pair)
        mg.sync_warp()
        with mg.when(self.lane.equals(0)):
            mem.signal(self.mark_place(self.share), self.tag)

    def finish(self, acc: list, others: mg.Int, tile: mg.Int) -> None:
        """Add the sums of the next `others` shares, and write the tile."""
        kept = self.exchange(acc)

        def take(i: mg.Int, _: list) -> list:
            index = self.lane + i * mg.WARP
            with mg.when(index < others):
                mem.await_signal(self.mark_place(self.share + 1 + index), self.tag)
            return []

        mg.loop((others + (mg.WARP - 1)) // mg.WARP, [], take)
        mg.sync_warp()
        self.store(self.add_sums(kept, others), tile)

    def add_sums(self, kept: list[list], others: mg.Int) -> list[list]:
        """Add what the next `others` shares left."""
        together = self.layout.together

        def load(index: mg.Int) -> list[list]:
            exists, share = index < others, (self.share + 1 + index).at_most(self.layout.blocks - 1)
            sums = [mem.load_floats(self.sum_place(share, i), 4) for i in range(len(kept))]
            return [[mg.select_float(exists, v, mg.zero()) for v in pair] for pair in sums]

        def body(i: mg.Int, carry: list) -> list:
            total = by_fours(carry)
            for sums in [load(i * together + j) for j in range(together)]:
                total = _add(total, sums)
            return flat(total)

        return by_fours(mg.loop((others + (together - 1)) // together, flat(kept), body))

    def mark_place(self, share: mg.Int) -> mg.Int:
        """Where this warp of a share marks that its sums are there: a warp needs no other's."""
        return self.marks + (share * WARPS + self.warp << 3).wide()

    def sum_place(self, share: mg.Int, pair: int) -> mg.Int:
        """Where a share's sums of a pair are, this thread's."""
        number = share * self.layout.pairs + pair
        return self.sums + (number * PAIR_BYTES + (self.thread << 4)).wide()

    def store(self, kept: list[list], tile: mg.Int) -> None:
        """Write a tile's columns to y."""
        kept = self.add_residual(kept, tile)
        if self.problem.n % 8:
            self.store_elements(kept, tile)
            return
        at_once = 2 * self.layout.pairs_at_once  # of half the size that they have in `exchange`
        for first in range(0, len(kept), at_once):
            mg.sync_block()  # what was staged before is read
            self.stage(kept[first : first + at_once])
            mg.sync_block()
            columns = range(first * PAIR, min((first + at_once) * PAIR, self.problem.m))
            self.store_lines(columns, tile)

    def store_lines(self, columns: range, tile: mg.Int) -> None:
        """Write staged columns, 8 rows a thread."""
        chunk = self.thread & (CHUNKS - 1)
        row, first = tile * ROWS + (chunk << 3), self.thread // CHUNKS
        for start in range(0, len(columns), THREADS // CHUNKS):
            line = first + start
            with mg.when(mg.both(line < len(columns), row < self.problem.n)):
                words = mem.load_words(self.staged(line, chunk))
                place = ((line + columns.start) * self.problem.n + row).wide()
                mem.store_words(self.out + place * 2, words)

    def stage(self, kept: list[list]) -> None:
        """Put columns into shared memory, transposed: two pairs a matrix store."""
        dtype, matrix = self.problem.dtype, self.lane >> 3
        column = (self.team << 3) + (self.lane & 7)
        chunk = (self.warp % TEAM << 1) + (matrix & 1)
        for first in range(0, len(kept), 2):
            two = kept[first], kept[min(first + 1, len(kept) - 1)]  # the same twice at the end
            words = [mg.pack_pair(*pair[i : i + 2], dtype) for pair in two for i in (0, 2)]
            step = PAIR if len(kept) - first > 1 else 0
            place = column + (first * PAIR) + (matrix >> 1) * step
            mem.store_matrices_transposed(self.staged(place, chunk), words)

    def staged(self, column: mg.Int, chunk: mg.Int) -> mg.Int:
        """Where 8 rows of a column are; columns are swizzled against bank conflicts."""
        return self.staging + (column * CHUNKS + (chunk ^ (column & 7)) << 4)

    def add_residual(self, kept: list[list], tile: mg.Int) -> list[list]:
        """Add to the columns that `exchange` gave what is added to y; past its end nothing is."""
        m, n = self.problem.m, self.problem.n
        row = tile * ROWS + self.warp_row + (self.lane >> 2)
        column = (self.team << 3) + ((self.lane & 3) << 1)
        for source in self.residual:
            for i, pair in enumerate(kept):
                for r in range(4):
                    place = (column + (PAIR * i + r % 2)).at_most(m - 1) * n
                    place = place + (row + 8 * (r // 2)).at_most(n - 1)
                    value = mem.load_half(source + (place << 1).wide(), self.problem.dtype)
                    pair[r] = mg.add(pair[r], value)
        return kept

    def store_elements(self, kept: list[list], tile: mg.Int) -> None:
        """Write a tile's columns one value at a time."""
        m, n, dtype = self.problem.m, self.problem.n, self.problem.dtype
        row = tile * ROWS + self.warp_row + (self.lane >> 2)
        column = (self.team << 3) + ((self.lane & 3) << 1)
        target = self.out + (column * n + row << 1).wide()
        for i, pair in enumerate(kept):
            for r, value in enumerate(pair):
                right, down = PAIR * i + r % 2, 8 * (r // 2)
                with mg.when(mg.both(column + right < m, row + down < n)):
                    mem.store(target + 2 * (right * n + down), mg.round_to(value, dtype))


def _add(a: list[list], b: list[list]) -> list[list]:
    return [[mg.add(u, v) for u, v in zip(p, q)] for p, q in zip(a, b, strict=True)]


def flat(pairs: list[list]) -> list:
    """The sums of all pairs, in one list."""
    return [value for pair in pairs for value in pair]


def by_fours(sums: list) -> list[list]:
    """The opposite of `flat`."""
    return [sums[i : i + 4] for i in range(0, len(sums), 4)]
