"""Hopper matmul for small batches, M <= 128: y^T = W x^T, W decoded into registers.

A tile is 128 weight rows; its work is counted in panels of 256 k. The blocks share all panels
evenly: a share may start or end inside a tile. The block with the start of a tile adds the sums of
the others, in order, through device memory. It waits only for blocks of lower numbers, which the
GPU starts earlier.

Two warpgroups of a block, a team, take 64 rows each, two more the same rows: the teams take turns
in the panels. A warpgroup decodes part of a panel into the registers of wgmma's left operand,
multiplied by the scales in x's dtype, while the part before is multiplied. A lane q of a quad needs
byte q of each packed word; it loads the words whole, and looks up that byte of each. x is the right
operand, in its natural order, in a ring of parts for each team.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels import mosaic_table as pair_table
from pallas_kernels.matmul.config import MID_ROWS as ROWS
from pallas_kernels.matmul.config import PANEL, MidTiles
from pallas_kernels.matmul.mosaic_low_rank import LowRank
from pallas_kernels.matmul.mosaic_panels import CHUNK, LanePanels, PanelLayout
from pallas_kernels.matmul.mosaic_x import TEAM, XLayout, XRing
from pallas_kernels.matmul.problem import OPERANDS, Operands, Problem

TEAMS = 2
WARPS = TEAMS * TEAM
THREADS = WARPS * mg.WARP
TEAM_THREADS = TEAM * mg.WARP
PAIR = 16  # columns: 8 that one team finishes, 8 that the other does
CHUNKS = ROWS // 8  # 16 bytes of a staged column
PAIR_BYTES = 16 * THREADS  # of their sums: 4 floats a thread


class Layout:
    """Sizes that follow from the problem and the tiles; the work and its division."""

    def __init__(self, problem: Problem, tiles: MidTiles):
        self.panel = PanelLayout(problem, WARPS, tiles.stages)
        self.x = XLayout(problem, TEAMS, tiles.x_stages, tiles.x_depth)
        self.columns = self.x.columns
        # With more sums in registers there is room for less of an operand.
        self.depth = 64 if self.columns <= 96 else 32  # k decoded and multiplied at once
        self.parts = PANEL // tiles.x_depth  # of x in a panel
        self.row_tiles = -(-problem.n // ROWS)
        self.panels = -(-problem.k // PANEL)  # of a tile
        self.total = self.row_tiles * self.panels
        self.blocks = min(tiles.blocks, self.total)
        first = [self.begin(b) for b in range(self.blocks)]
        self.splits = any(panel % self.panels for panel in first)
        ends = [self.share_of((t + 1) * self.panels - 1) for t in range(self.row_tiles)]
        self.others = max(end - self.share_of(t * self.panels) for t, end in enumerate(ends))
        self.pairs = -(-self.columns // PAIR)
        self.pairs_at_once = min(self.pairs, 2)
        self.together = min(max(1, 16 // self.pairs), self.others)  # sums loaded at once

    def begin(self, share):
        """The first panel of a share of the work (of the end, for the number of blocks)."""
        return share * self.total // self.blocks

    def share_of(self, panel):
        """The share that has a panel."""
        return ((panel + 1) * self.blocks - 1) // self.total

    def scratch(self, _=None) -> dict:
        """Shared memory of a block, by name."""
        return (
            self.panel.scratch()
            | self.x.scratch()
            | {
                "table": plgpu.SMEM((2 * pair_table.WORDS,), jnp.int32),
                "staging": plgpu.SMEM((self.pairs_at_once * PAIR_BYTES // 4,), jnp.float32),
            }
        )

    def sums(self) -> list[jax.ShapeDtypeStruct]:
        """Device memory for the sums that a block leaves to another, and their marks."""
        if not self.splits:
            return []
        size = self.pairs * PAIR_BYTES // 4
        return [
            jax.ShapeDtypeStruct((self.blocks, size), jnp.float32),
            jax.ShapeDtypeStruct((self.blocks, WARPS, 2), jnp.int32),
        ]


class _Block:
    """One thread's view of the kernel."""

    def __init__(self, context, problem, tiles, layout: Layout, refs: Operands, out, sums, scratch):
        self.problem, self.tiles, self.layout = problem, tiles, layout
        self.thread = mg.thread_index()
        self.ring = LanePanels(layout.panel, refs, scratch)
        self.warp, self.lane = self.ring.warp, self.ring.lane
        self.team, self.warp_row = self.warp // TEAM, self.warp % TEAM * 16
        self.own_byte = pair_table.selector(self.lane & 3)
        self.x = XRing(context, layout.x, self.team, self.warp % TEAM, refs.x, scratch)
        # Later blocks have earlier work: the start of a tile waits for the blocks of its end.
        self.share = mg.Int(layout.blocks - 1) - mg.block_index()
        self.first, self.end = layout.begin(self.share), layout.begin(self.share + 1)
        self.count = self.team_panels(self.end)
        self.out, self.codebook = mem.global_address(out), mem.global_address(refs.codebook)
        if layout.splits:
            self.sums, self.marks = (mem.global_address(ref) for ref in sums)
            self.tag = mem.grid_tag()
        self.adapter = LowRank(problem, refs, self.ring.layer) if problem.rank else None
        self.residual = [mem.global_address(ref) for ref in refs.residual]
        self.table = mem.shared_address(scratch["table"])
        self.staging = mem.shared_address(scratch["staging"])

    # Panels: the team's panel i is one of those of all tiles

    def panel(self, i: mg.Int) -> mg.Int:
        """The team's panel i."""
        return self.first + self.team + (i << 1)

    def team_panels(self, end: mg.Int) -> mg.Int:
        """How many panels of the share are the team's, of those before `end`."""
        return end - self.first + 1 - self.team >> 1

    def place(self, i: mg.Int) -> tuple[mg.Int, mg.Int]:
        """This warp's first weight row in panel i, and the panel's place along K."""
        panel = self.panel(i)
        row = panel // self.layout.panels * ROWS + self.warp_row
        return row, panel % self.layout.panels

    def copy_panel(self, i: mg.Int) -> None:
        """Start to copy this warp's part of panel i."""
        row, panel = self.place(i)
        self.ring.start(i % self.tiles.stages, row, panel, i < self.count)

    def first_k(self, part: mg.Int) -> mg.Int:
        """The first k of the team's part of x."""
        parts = self.layout.parts
        return self.place(part // parts)[1] * PANEL + part % parts * self.tiles.x_depth

    def copy_x(self, part: int) -> None:
        """By one thread of the team: start to copy one of the first parts of x, if it exists."""
        with mg.when(mg.Int(part) < self.count * self.layout.parts):
            self.x.copy(mg.Int(part), self.first_k(mg.Int(part)))

    # Products

    def run_panel(self, i: mg.Int, acc: list) -> list:
        """Multiply the team's panel i, each part while the next is decoded."""
        if self.layout.parts == 1:  # else ptxas finds out by itself, with fewer instructions
            i = mg.uniform(i)
        slot, depth, (row, panel) = i % self.tiles.stages, self.layout.depth, self.place(i)
        scales = self.ring.scales
        scales.decode(scales.load(slot, row, self.ring.first_scale(panel)))
        values = scales.read(slot, 0, self.layout.panel.scales.columns)
        pairs = [[mg.pack_pair(s, s, self.problem.dtype) for s in row] for row in values]
        a = self.decode_part(slot, 0, pairs)
        for k in range(0, PANEL, depth):
            part, within = divmod(k, self.tiles.x_depth)
            part = i * self.layout.parts + part
            if within == 0:
                x = self.x.wait(part)
            operand = self.x.operand(x, within)
            acc = mg.wgmma_start(acc, a, operand, 32 >> 4, self.problem.dtype)
            upcoming = []
            if k + depth < PANEL:
                upcoming = self.decode_part(slot, k + depth, pairs)
            if k + 2 * depth == PANEL:  # the panel is read
                mg.sync_warp()
                self.copy_panel(i + self.tiles.stages)
            acc = mg.wgmma_finish(acc, a)
            if within + depth == self.tiles.x_depth:
                self.x.leave(part, self.count * self.layout.parts, self.first_k)
            a = upcoming
        return acc

    def decode_part(self, slot: mg.Int, k: int, scales: list[list[mg.Int]]) -> list[mg.Int]:
        """The left operand of a panel's part from k on: 4 words of pairs for each 16 k."""
        a = []
        for first in range(k, k + self.layout.depth, CHUNK):
            column = first // self.problem.block_size
            rows = zip(self.ring.chunk(slot, first // CHUNK), scales)
            top, bottom = (self.decode(words, row[column]) for words, row in rows)
            a += [top[0], bottom[0], top[1], bottom[1], top[2], bottom[2], top[3], bottom[3]]
        return a

    def decode(self, words: list[mg.Int], scale: mg.Int) -> list[mg.Int]:
        lookup = functools.partial(pair_table.lookup, selector=self.own_byte, table=self.table)
        pairs = [lookup(word, lane_offset=self.lane << 2) for word in words]
        return [mg.mul_pairs(pair, scale, self.problem.dtype) for pair in pairs]

    def run_tile(self, tile: mg.Int) -> None:
        """Multiply the share's panels of a tile, and write what they give."""
        head, tail = tile * self.layout.panels, (tile + 1) * self.layout.panels
        begins = self.first < head + 1
        start = self.team_panels(mg.select(begins, head, self.first))
        stop = self.team_panels(tail.at_most(self.end))
        adapter = self.load_adapter(tile, begins)
        acc = [mg.zero()] * (self.layout.columns // 2)
        acc = mg.loop(stop - start, acc, lambda i, acc: self.run_panel(start + i, acc))
        acc = self.add_adapter(acc, adapter)
        if not self.layout.splits:
            self.store(self.exchange(acc), tile)
            return
        last = self.layout.share_of(tail - 1)
        others = mg.select(self.end < tail, last - self.share, 0)
        mg.branch(begins, lambda: self.finish(acc, others, tile), lambda: self.leave_sums(acc))

    # What is added

    def load_adapter(self, tile: mg.Int, begins: mg.Value) -> list:
        """By one team of the block with a tile's start: (what `LowRank.load` takes, its words)."""
        if self.adapter is None:
            return []
        row, columns = tile * ROWS + self.warp_row, self.layout.columns // 8
        steps = self.adapter.steps(mg.Int(0), 1, mg.both(begins, self.team.equals(0)))
        arguments = [(row, [step], columns) for step in steps]
        # The panels hide the latency of the first; for more there are no registers.
        early = [self.adapter.load(*arguments[0])]
        return list(itertools.zip_longest(arguments, early))

    def add_adapter(self, acc: list, adapter: list) -> list:
        """Add its term: wgmma's sums of a warp are those of mma, of 16 rows."""
        parts = _pairs(acc)
        for arguments, words in adapter:
            words = self.adapter.load(*arguments) if words is None else words
            self.adapter.add(words, arguments[1], parts)
        return _flat(parts)

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

    # Results: a thread has 4 sums of each 8 columns, of which a team finishes every other.

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

    def mark_place(self, share: mg.Int) -> mg.Int:
        """Where this warp of a share marks that its sums are there: a warp needs no other's."""
        return self.marks + (share * WARPS + self.warp << 3).wide()

    def sum_place(self, share: mg.Int, pair: int) -> mg.Int:
        """Where a share's sums of a pair are, this thread's."""
        number = share * self.layout.pairs + pair
        return self.sums + (number * PAIR_BYTES + (self.thread << 4)).wide()

    def add_sums(self, kept: list[list], others: mg.Int) -> list[list]:
        together = self.layout.together

        def load(index: mg.Int) -> list[list]:
            exists, share = index < others, (self.share + 1 + index).at_most(self.layout.blocks - 1)
            sums = [mem.load_floats(self.sum_place(share, i), 4) for i in range(len(kept))]
            return [[mg.select_float(exists, v, mg.zero()) for v in pair] for pair in sums]

        def body(i: mg.Int, flat: list) -> list:
            total = _pairs(flat)
            for sums in [load(i * together + j) for j in range(together)]:
                total = _add(total, sums)
            return _flat(total)

        return _pairs(mg.loop((others + (together - 1)) // together, _flat(kept), body))

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

    def store_elements(self, kept: list[list], tile: mg.Int) -> None:
        m, n, dtype = self.problem.m, self.problem.n, self.problem.dtype
        row = tile * ROWS + self.warp_row + (self.lane >> 2)
        column = (self.team << 3) + ((self.lane & 3) << 1)
        target = self.out + (column * n + row << 1).wide()
        for i, pair in enumerate(kept):
            for r, value in enumerate(pair):
                right, down = PAIR * i + r % 2, 8 * (r // 2)
                with mg.when(mg.both(column + right < m, row + down < n)):
                    mem.store(target + 2 * (right * n + down), mg.round_to(value, dtype))

    def run(self) -> None:
        # Memory answers in order: what is needed first must be asked for first.
        code = pair_table.load_code(self.codebook)
        table = self.ring.scales.load_table() if self.problem.double else []
        first_lane = mg.both((self.warp % TEAM).equals(0), self.lane.equals(0))
        first_parts = min(self.tiles.x_stages, self.layout.parts)
        with mg.when(first_lane):
            self.x.initialize()
            for part in range(first_parts):
                self.copy_x(part)
        mg.sync_warp()
        self.copy_panel(mg.Int(0))
        pair_table.build(self.table, code, self.problem.dtype, WARPS, pair_table.WIDE)
        with mg.when(first_lane):
            for part in range(first_parts, self.tiles.x_stages):
                self.copy_x(part)
        mg.sync_warp()
        for i in range(1, self.tiles.stages):
            self.copy_panel(mg.Int(i))
        if self.problem.double:
            with mg.when(self.warp.equals(0)):
                self.ring.scales.store_table(table)
        mg.sync_block()
        tile = self.first // self.layout.panels
        tiles = (self.end - 1) // self.layout.panels - tile + 1
        mg.loop(tiles, [], lambda j, _: self.run_tile(tile + j) or [])


def _add(a: list[list], b: list[list]) -> list[list]:
    return [[mg.add(u, v) for u, v in zip(p, q)] for p, q in zip(a, b, strict=True)]


def _flat(pairs: list[list]) -> list:
    return [value for pair in pairs for value in pair]


def _pairs(flat: list) -> list[list]:
    return [flat[i : i + 4] for i in range(0, len(flat), 4)]


@functools.cache
def build(problem: Problem, tiles: MidTiles):
    """The kernel of a problem: a function of its `Operands` giving y [M, N]."""
    layout = Layout(problem, tiles)
    out = jax.ShapeDtypeStruct((problem.m, problem.n), problem.dtype)

    def qjax_matmul_mid(*arrays):
        refs, (out, *sums, scratch) = Operands(*arrays[:OPERANDS]), arrays[OPERANDS:]
        arguments = (refs, out, tuple(sums), scratch)
        types = jax.tree.map(lambda _: plgpu.RefType(), arguments)

        @plgpu.inline_mgpu(arg_types=types)
        def body(context, refs, out, sums, scratch):
            _Block(context, problem, tiles, layout, refs, out, sums, scratch).run()

        body(*arguments)

    kernel = plgpu.kernel(
        qjax_matmul_mid,
        out_type=[out, *layout.sums()],
        grid=(layout.blocks,),
        grid_names=("block",),
        num_threads=WARPS // 4,
        thread_name="warpgroup",
        scratch_types=[layout.scratch()],
        compiler_params=mg.COMPILER_PARAMS,
    )
    return lambda operands: kernel(*operands)[0]
