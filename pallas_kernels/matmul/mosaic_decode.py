"""Hopper matmul for decoding, M <= 16: each packed byte is read once, at the speed of the memory.

A block holds one slice of K (a "slab", split among its warps in panels of 256) and walks over tiles
of 16 weight rows; several slabs are the blocks of a cluster. A byte becomes a pair of 16-bit codes
by one shared-memory lookup, m16n8k16 products accumulate a scale block, and the block sum is
multiplied by its float32 scale. Sums have a fixed order.
"""

import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels import mosaic_table as pair_table
from pallas_kernels.matmul.config import DecodeTiles
from pallas_kernels.matmul.decode_layout import Layout, Share
from pallas_kernels.matmul.mosaic_decode_result import Result
from pallas_kernels.matmul.mosaic_decode_x import Fragment, X
from pallas_kernels.matmul.mosaic_panels import CHUNKS, TensorPanels
from pallas_kernels.matmul.mosaic_terms import Terms
from pallas_kernels.matmul.problem import Operands, Problem


class _Block:
    """One thread's view of the kernel."""

    def __init__(self, context, problem, tiles, layout, refs: Operands, out, scratch):
        self.problem, self.tiles, self.layout = problem, tiles, layout
        self.ring = TensorPanels(context, layout.panel, refs, scratch)
        self.warp, self.lane = self.ring.warp, self.ring.lane
        self.share = Share(layout)
        self.x = X(problem, tiles, layout, self.share, refs.x)
        self.x.place(scratch["x"], self.warp, self.lane)
        self.terms = Terms(problem, layout.terms, refs, self.ring.layer, scratch)
        self.result = Result(problem, tiles, layout, self.share)
        self.result.place(out, self.terms, self.warp, self.lane, scratch)
        self.codebook = mem.global_address(refs.codebook)
        self.table = mem.shared_address(scratch["table"])

    def unit(self, i: mg.Int, step: int) -> mg.Int:
        """The number of this warp's panel of tile i among all that it takes."""
        return i * self.layout.steps + step

    def copy_panel(self, i: mg.Int, step: int) -> None:
        """Start to copy this warp's panel of tile i."""
        share, exists = self.share, i < self.share.tiles
        if step == 0 and self.layout.terms.slot:
            with mg.when(mg.both(mg.both(exists, share.owns(i)), self.warp.equals(0))):
                self.terms.copy(i, share.row(i))
        slot = self.unit(i, step) % self.tiles.stages
        panel, last = (share.first_panel + p for p in (self.x.panel(step), share.panels - 1))
        self.ring.start(slot, share.row(i), panel, exists, last)

    def copy_ahead(self, i: mg.Int, step: int) -> None:
        """Start to copy the panel that takes the place of a panel of tile i."""
        tiles, step = divmod(step + self.tiles.stages, self.layout.steps)
        self.copy_panel(i + tiles, step)

    # Products

    def multiply(self, i: mg.Int, x: list[Fragment]) -> list[list]:
        """This warp's partial product of tile i: 4 floats for each group of 8 columns."""
        acc = [[mg.zero()] * 4 for _ in range(self.layout.columns)]
        for step in range(self.layout.steps):
            unit = self.unit(i, step)
            self.ring.wait(unit % self.tiles.stages, unit // self.tiles.stages & 1)
            self.multiply_panel(i, step, x, acc)
        return acc

    def multiply_panel(self, i: mg.Int, step: int, x: list[Fragment], acc: list[list]) -> None:
        """Add a panel's products to `acc`; its place is refilled as soon as it is read."""
        slot, ring, share = self.unit(i, step) % self.tiles.stages, self.ring, self.share
        words = ring.words(slot, 0, CHUNKS)
        panel = self.x.panel(step).at_most(share.panels - 1) + share.first_panel
        raw = ring.scales.load(slot, share.row(i), ring.first_scale(panel))
        count, scales = self.layout.panel.scales.columns, None
        per_block = CHUNKS // count
        for block in range(count):
            part = [[mg.zero()] * 4 for _ in range(self.layout.columns)]
            for chunk in range(block * per_block, (block + 1) * per_block):
                b = [self.x.fragment(x, step, chunk, c) for c in range(self.layout.columns)]
                self.multiply_chunk(words[chunk], b, part)
            if scales is None:  # late, so that the first products hide their latency
                ring.scales.decode(raw)
                scales = ring.scales.read(slot, 0, count)
                if not self.layout.together:
                    mg.sync_warp()
                    self.copy_ahead(i, step)
            for total, new in zip(acc, part):
                total[:] = [mg.fma(new[r], scales[r // 2][block], total[r]) for r in range(4)]

    def multiply_chunk(self, words: tuple, b: list[list[mg.Int]], part: list[list]) -> None:
        """Add the products of 32 k to `part`."""
        top, bottom = (pair_table.decode_word(word, self.table, self.lane << 2) for word in words)
        for half in (0, 2):
            a = [top[half], bottom[half], top[half + 1], bottom[half + 1]]
            for total, fragment in zip(part, b):
                total[:] = mg.mma(total, a, fragment[half : half + 2], self.problem.dtype)

    def start(self) -> list[Fragment]:
        """Make the table and start all copies; gives x."""
        # Memory answers in order: what is needed first must be asked for first.
        code = pair_table.load_code(self.codebook)
        scale_table = self.ring.scales.load_table() if self.problem.double else []
        x = self.x.load() if self.layout.x_first else []
        self.ring.initialize()
        self.result.initialize()
        with mg.when(self.warp.equals(0)):
            self.terms.copy_hidden()
        self.copy_panel(mg.Int(0), 0)
        x = x or self.x.load()
        pair_table.build(self.table, code, self.problem.dtype, self.tiles.warps)
        for unit in range(1, self.tiles.stages):  # when all warps have asked for their first
            i, step = divmod(unit, self.layout.steps)
            self.copy_panel(mg.Int(i), step)
        if self.problem.double:
            with mg.when(self.warp.equals(0)):
                self.ring.scales.store_table(scale_table)
        x = self.x.store(x)
        mg.sync_block()
        self.result.wait()
        return x

    def run(self) -> None:
        x = self.start()

        def body(i: mg.Int, _: list) -> list:
            self.result.put(i, self.multiply(i, x))
            mg.sync_block()
            if self.layout.together:
                # All at once, so that the memory sees whole rows of the tile: 1.0 us of 15.4.
                self.copy_ahead(i, 0)
            self.result.take(i)
            return []

        mg.loop(self.share.tiles, [], body)
        self.result.end(self.share.tiles)


@functools.cache
def build(problem: Problem, tiles: DecodeTiles, sms: int):
    """The kernel of a problem: a function of its `Operands` giving y [M, N]."""
    layout = Layout(problem, tiles, sms)
    cluster = {"cluster": (tiles.slabs,), "cluster_names": ("slab",)} if tiles.slabs > 1 else {}

    def qjax_matmul_decode(*refs_out_scratch):
        *refs, out, scratch = refs_out_scratch
        refs = Operands(*refs)
        types = jax.tree.map(lambda _: plgpu.RefType(), (refs, out, scratch))

        @plgpu.inline_mgpu(arg_types=types)
        def body(context, refs, out, scratch):
            _Block(context, problem, tiles, layout, refs, out, scratch).run()

        body(refs, out, scratch)

    kernel = plgpu.kernel(
        qjax_matmul_decode,
        out_type=jax.ShapeDtypeStruct((problem.m, problem.n), problem.dtype),
        grid=(layout.clusters,),
        grid_names=("block",),
        **cluster,
        num_threads=tiles.warps // 4,
        thread_name="warpgroup",
        scratch_types=[layout.scratch(tiles)],
        compiler_params=mg.COMPILER_PARAMS,
    )
    return lambda operands: kernel(*operands)
