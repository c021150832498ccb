"""Hopper matmul for small batches, M <= 128: y^T = W x^T, W decoded into registers.

A tile is 64, 128 or 256 weight rows; its work is counted in panels of 256 k. The blocks share all
panels evenly: a share may start or end inside a tile. Where whole blocks share a tile they can be a
cluster, and exchange sums through their shared memory. Else the block with the start of a tile adds
the sums of the others, in order, through device memory. It waits only for blocks of lower numbers,
which the GPU starts earlier.

The 4 warpgroups of a block take 64 rows each. They are 4, 2 or 1 teams: those of a team have
different rows, the teams the same rows, and take turns in the panels. A warpgroup decodes part of a
panel into the registers of wgmma's left operand, multiplied by the scales in x's dtype, while the
part before is multiplied. A lane q of a quad needs byte q of each packed word; it loads the words
whole, and looks up that byte of each. x is the right operand, in its natural order, in a ring of
parts for each team.
"""

import functools
import itertools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels import mosaic_table as pair_table
from pallas_kernels.matmul.config import PANEL, MidTiles
from pallas_kernels.matmul.mid_layout import WARPS, Layout
from pallas_kernels.matmul.mosaic_low_rank import LowRank
from pallas_kernels.matmul.mosaic_mid_result import Result
from pallas_kernels.matmul.mosaic_mid_sums import Sums, by_fours, flat
from pallas_kernels.matmul.mosaic_panels import CHUNK, LanePanels
from pallas_kernels.matmul.mosaic_x import XRing
from pallas_kernels.matmul.problem import OPERANDS, Operands, Problem


class _Block:
    """One thread's view of the kernel."""

    def __init__(self, context, problem, tiles, layout: Layout, refs: Operands, out, sums, scratch):
        self.problem, self.tiles, self.layout = problem, tiles, layout
        self.ring = LanePanels(layout.panel, refs, scratch)
        self.warp, self.lane = self.ring.warp, self.ring.lane
        self.team, self.team_warp = self.warp // layout.team_warps, self.warp % layout.team_warps
        self.own_byte = pair_table.selector(self.lane & 3)
        self.x = XRing(context, layout.x, self.team, self.team_warp, refs.x, scratch)
        # Later blocks have earlier work: the start of a tile waits for the blocks of its end.
        self.share = mg.Int(layout.blocks - 1) - mg.block_index()
        self.first, self.end = layout.begin(self.share), layout.begin(self.share + 1)
        self.count = self.team_panels(self.end)
        self.sums = Sums(layout, sums, scratch, self.share, self.warp)
        self.result = Result(problem, layout, refs, out, scratch, self.sums.rank, self.warp)
        self.codebook = mem.global_address(refs.codebook)
        self.adapter = LowRank(problem, refs, self.ring.layer) if problem.rank else None
        self.table = mem.shared_address(scratch["table"])

    # Panels: the team's panel i is one of those of all tiles

    def panel(self, i: mg.Int) -> mg.Int:
        """The team's panel i."""
        return self.first + self.team + i * self.layout.teams

    def team_panels(self, end: mg.Int) -> mg.Int:
        """How many panels of the share are the team's, of those before `end`."""
        teams = self.layout.teams
        return (end - self.first + (teams - 1) - self.team) // teams

    def place(self, i: mg.Int) -> tuple[mg.Int, mg.Int]:
        """This warp's first weight row in panel i, and the panel's place along K."""
        panel = self.panel(i)
        return self.row(panel // self.layout.panels), panel % self.layout.panels

    def row(self, tile: mg.Int) -> mg.Int:
        """This warp's first weight row in a tile."""
        return tile * self.layout.rows + (self.team_warp << 4)

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
        parts, late = self.layout.parts, self.layout.late
        for k in range(0, PANEL, depth):
            number, within = divmod(k, self.tiles.x_depth)
            part = i * parts + number
            if within == 0 and (not late or number == 0):
                x = self.x.wait(part)
            operand = self.x.operand(x, within)
            acc = mg.wgmma_start(acc, a, operand, 32 >> 4, self.problem.dtype)
            if within == 0 and late and number > 0:
                self.refill(part - 1)
            upcoming = []
            if k + depth < PANEL:
                upcoming = self.decode_part(slot, k + depth, pairs)
            if k + 2 * depth == PANEL:  # the panel is read
                mg.sync_warp()
                self.copy_panel(i + self.tiles.stages)
            ends, late_here = within + depth == self.tiles.x_depth, late and number + 1 < parts
            if ends and late_here:
                x = self.x.wait(part + 1)
            acc = mg.wgmma_finish(acc, a)
            if ends:
                self.x.leave(part)
                if not late_here:
                    self.refill(part)
            a = upcoming
        return acc

    def refill(self, part: mg.Int) -> None:
        """After a part of x is left: bring another to its place."""
        self.x.refill(part, self.count * self.layout.parts, self.first_k)

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
        table = self.own_byte, self.table, self.lane << 2, self.layout.pitch
        pairs = [pair_table.lookup(word, *table) for word in words]
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
        if self.layout.cluster > 1:
            self.result.store(self.sums.exchange_blocks(acc), tile)
            return
        if not self.layout.splits:
            self.result.store(self.sums.exchange(acc), tile)
            return
        last = self.layout.share_of(tail - 1)
        others = mg.select(self.end < tail, last - self.share, 0)
        mg.branch(
            begins,
            lambda: self.result.store(self.sums.gather(acc, others), tile),
            lambda: self.sums.leave(acc),
        )

    # What is added

    def load_adapter(self, tile: mg.Int, begins: mg.Value) -> list:
        """By one team of the block with a tile's start: (what `LowRank.load` takes, its words)."""
        if self.adapter is None:
            return []
        row, columns = self.row(tile), self.layout.columns // 8
        steps = self.adapter.steps(mg.both(begins, self.team.equals(0)))
        arguments = [(row, [step], columns) for step in steps]
        # The panels hide the latency of the first; for more there are no registers.
        early = [self.adapter.load(*arguments[0])]
        return list(itertools.zip_longest(arguments, early))

    def add_adapter(self, acc: list, adapter: list) -> list:
        """Add its term: wgmma's sums of a warp are those of mma, of 16 rows."""
        parts = by_fours(acc)
        for arguments, words in adapter:
            words = self.adapter.load(*arguments) if words is None else words
            self.adapter.add(words, arguments[1], parts)
        return flat(parts)

    def run(self) -> None:
        # Memory answers in order: what is needed first must be asked for first.
        code = pair_table.load_code(self.codebook)
        table = self.ring.scales.load_table() if self.problem.double else []
        first_lane = mg.both(self.team_warp.equals(0), self.lane.equals(0))
        first_parts = min(self.tiles.x_stages, self.layout.parts)
        with mg.when(first_lane):
            self.x.initialize()
            for part in range(first_parts):
                self.copy_x(part)
        with mg.when(mg.both(first_lane, self.team.equals(0))):
            self.sums.initialize()
        mg.sync_warp()
        self.copy_panel(mg.Int(0))
        pair_table.build(self.table, code, self.problem.dtype, WARPS, self.layout.pitch)
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

    cluster = {}
    if layout.cluster > 1:
        cluster = {"cluster": (layout.cluster,), "cluster_names": ("rank",)}
    kernel = plgpu.kernel(
        qjax_matmul_mid,
        out_type=[out, *layout.sums()],
        grid=(layout.blocks // layout.cluster,),
        grid_names=("block",),
        **cluster,
        num_threads=WARPS // 4,
        thread_name="warpgroup",
        scratch_types=[layout.scratch()],
        compiler_params=mg.COMPILER_PARAMS,
    )
    return lambda operands: kernel(*operands)[0]
