"""Hopper matmul for decoding, M <= 16: each packed byte is read once, at the speed of the memory.

A block holds one slice of K (a "slab", split among its warps in panels of 256) and walks over tiles
of 16 weight rows. The fragments of x stay in registers for the whole kernel or, where they are too
many, x does in shared memory. A byte becomes a pair of 16-bit codes by one shared-memory lookup,
m16n8k16 products accumulate a scale block, and the block sum is multiplied by its float32 scale.
The order of K is the same on both sides: lane q of a quad owns bytes 4q..4q+3 of each 16, that is
8 consecutive k, so x is read in its natural order. Sums have a fixed order.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels import mosaic_table as pair_table
from pallas_kernels.matmul.config import PANEL, DecodeTiles
from pallas_kernels.matmul.mosaic_panels import CHUNK, CHUNKS, ROWS, PanelLayout, TensorPanels
from pallas_kernels.matmul.mosaic_slabs import SlabSums
from pallas_kernels.matmul.mosaic_terms import TermLayout, Terms
from pallas_kernels.matmul.problem import Operands, Problem

COLUMN = ROWS + 4  # floats between columns of a partial result: no bank conflict when it is written


class Layout:
    """Sizes that follow from the problem and the tiles."""

    def __init__(self, problem: Problem, tiles: DecodeTiles, sms: int):
        self.m, self.columns = problem.m, -(-problem.m // 8)  # groups of 8 rows of x
        self.panels = -(-problem.k // PANEL)
        self.slab_panels = -(-self.panels // tiles.slabs)  # of the largest slab
        self.steps = -(-self.slab_panels // tiles.warps)  # panels of a warp
        self.tiles = -(-problem.n // ROWS)
        self.groups = min(sms // tiles.slabs, self.tiles)  # clusters
        self.together = tiles.together and self.steps == 1
        self.panel = PanelLayout(problem, tiles.warps, tiles.stages)
        self.x_row = self.steps * tiles.warps * PANEL * 2 + 16  # bytes: rows in different banks
        self.terms = TermLayout(problem, tiles)
        self.partial = 8 * self.columns * COLUMN  # floats of one warp

    def scratch(self, tiles: DecodeTiles) -> dict:
        """Shared memory of a block, by name."""
        x_size = self.m * self.x_row // 4 if tiles.shared_x else 1
        return (
            self.panel.scratch()
            | self.terms.scratch()
            | self.panel.barriers()
            | {
                "x": plgpu.SMEM((x_size,), jnp.int32),
                "table": plgpu.SMEM((pair_table.WORDS,), jnp.int32),
                "partials": plgpu.SMEM((2 * tiles.warps * self.partial,), jnp.float32),
            }
            | (SlabSums.scratch(self.m, tiles.slabs) if tiles.slabs > 1 else {})
        )


class _Block:
    """One thread's view of the kernel."""

    def __init__(self, context, problem, tiles, layout, refs: Operands, out, scratch):
        self.problem, self.tiles, self.layout = problem, tiles, layout
        self.ring = TensorPanels(context, layout.panel, refs, scratch)
        self.warp, self.lane = self.ring.warp, self.ring.lane
        self.thread = mg.thread_index() % mg.WARPGROUP
        self.group, self.quad = self.lane >> 2, self.lane & 3
        slab, self.first_tile = mg.Int(0), mg.block_index()
        self.slabs = None
        if tiles.slabs > 1:
            self.slabs = SlabSums(problem.m, tiles.slabs, scratch)
            slab, self.first_tile = self.slabs.rank, mg.block_index() // tiles.slabs
        self.count = (mg.Int(layout.tiles + layout.groups - 1) - self.first_tile) // layout.groups
        self.first_panel = slab * layout.panels // tiles.slabs
        self.slab_panels = (slab + 1) * layout.panels // tiles.slabs - self.first_panel
        self.out = mem.global_address(out)
        self.x, self.codebook = mem.global_address(refs.x), mem.global_address(refs.codebook)
        self.table = mem.shared_address(scratch["table"])
        self.partials = mem.shared_address(scratch["partials"])
        self.terms = Terms(problem, layout.terms, refs, self.ring.layer, scratch)
        self.x_rows = mem.shared_address(scratch["x"])

    def unit(self, i: mg.Int, step: int) -> mg.Int:
        """The number of this warp's panel of tile i among all that it takes."""
        return i * self.layout.steps + step

    def panel(self, step: int) -> mg.Int:
        """This warp's panel within the slab; may lie past its end."""
        return self.warp + step * self.tiles.warps

    def row(self, i: mg.Int) -> mg.Int:
        """The first weight row of tile i."""
        return (self.first_tile + i * self.layout.groups) * ROWS

    def copy_panel(self, i: mg.Int, step: int) -> None:
        """Start to copy this warp's panel of tile i."""
        if step == 0 and self.layout.terms.slot:
            exists = mg.both(self.warp.equals(0), i < self.count)
            with mg.when(mg.both(exists, self.owns(i)) if self.slabs else exists):
                self.terms.copy(i, self.row(i))
        slot = self.unit(i, step) % self.tiles.stages
        panel, last = (self.first_panel + p for p in (self.panel(step), self.slab_panels - 1))
        self.ring.start(slot, self.row(i), panel, i < self.count, last)

    def copy_ahead(self, i: mg.Int, step: int) -> None:
        """Start to copy the panel that takes the place of a panel of tile i."""
        tiles, step = divmod(step + self.tiles.stages, self.layout.steps)
        self.copy_panel(i + tiles, step)

    # x

    def load_x(self) -> list[list[mg.Int]]:
        """Start to load the mma B fragments of this warp's panels, 4 words each."""
        parts = []
        for step in range(self.layout.steps):
            for column in range(self.layout.columns):
                for chunk in range(CHUNKS):
                    k = self.panel(step) * PANEL + (self.quad << 3) + chunk * CHUNK
                    parts.append(self.load_8(self.group + 8 * column, k))
        return parts

    def load_x_rows(self) -> list[list[mg.Int]]:
        """Start to load x of this slab, for `store_x_rows`: each thread its share."""
        return [self.load_8(row, k) for row, k in self.x_places()]

    def store_x_rows(self, parts: list[list[mg.Int]]) -> None:
        for (row, k), words in zip(self.x_places(), parts):
            with mg.when(row < self.problem.m):
                mem.store_words(self.x_rows + row * self.layout.x_row + (k << 1), words)

    def x_places(self) -> list[tuple[mg.Int, mg.Int]]:
        """(row, k) of each 8 elements that this thread brings; rows may lie past the end."""
        eights = (self.layout.x_row - 16) // 16
        count, threads = self.problem.m * eights, self.tiles.warps * mg.WARP
        places = [mg.thread_index() + first for first in range(0, count, threads)]
        return [(place // eights, place % eights << 3) for place in places]

    def load_8(self, row: mg.Int, k: mg.Int) -> list[mg.Int]:
        """Start to load 8 elements of x, k counted from the slab's first; zeros past its end."""
        place = self.first_panel * PANEL + k
        valid = mg.both(row < self.problem.m, place < self.problem.k)
        valid = mg.both(valid, k < self.slab_panels * PANEL)
        offset = row * self.problem.k + place
        return mem.load_words_where(valid, self.x + (offset << 1).wide())

    def fragment(self, x: list, step: int, chunk: int, column: int) -> list[mg.Int]:
        """4 words of x for an mma: from registers, or from shared memory when `x` is empty."""
        if x:
            return x[(step * self.layout.columns + column) * CHUNKS + chunk]
        row = (self.group + 8 * column).at_most(self.problem.m - 1)  # past the end any will do
        k = self.panel(step) * PANEL + (self.quad << 3) + chunk * CHUNK
        return mem.load_words(self.x_rows + row * self.layout.x_row + (k << 1))

    # Products

    def multiply(self, i: mg.Int, x: list) -> list[list]:
        """This warp's partial product of tile i: 4 floats for each group of 8 columns."""
        acc = [[mg.zero()] * 4 for _ in range(self.layout.columns)]
        for step in range(self.layout.steps):
            unit = self.unit(i, step)
            self.ring.wait(unit % self.tiles.stages, unit // self.tiles.stages & 1)
            self.multiply_panel(i, step, x, acc)
        return acc

    def multiply_panel(self, i: mg.Int, step: int, x: list, acc: list[list]) -> None:
        """Add a panel's products to `acc`; its place is refilled as soon as it is read."""
        slot, ring = self.unit(i, step) % self.tiles.stages, self.ring
        words = ring.words(slot, 0, CHUNKS)
        panel = self.panel(step).at_most(self.slab_panels - 1) + self.first_panel
        raw = ring.scales.load(slot, self.row(i), ring.first_scale(panel))
        count, scales = self.layout.panel.scales.columns, None
        per_block = CHUNKS // count
        for block in range(count):
            part = [[mg.zero()] * 4 for _ in range(self.layout.columns)]
            for chunk in range(block * per_block, (block + 1) * per_block):
                b = [self.fragment(x, step, chunk, c) for c in range(self.layout.columns)]
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

    def write_partial(self, i: mg.Int, acc: list[list]) -> None:
        buffer = (i & 1) * self.tiles.warps + self.warp
        base = self.partials + buffer * (4 * self.layout.partial)
        base = base + ((self.quad * (2 * COLUMN) + self.group) << 2)
        for column, values in enumerate(acc):
            for r, value in enumerate(values):
                offset = (8 * column + r % 2) * COLUMN + 8 * (r // 2)
                mem.store(base + 4 * offset, value)

    def reduce(self, i: mg.Int) -> None:
        """By one warpgroup: sum the warps' partials of tile i; write the result, or send it."""
        if self.slabs:
            with mg.when(mg.both(self.owns(i), self.thread.equals(0))):
                self.slabs.expect(i)
        for index in self.elements():
            with mg.when(index < ROWS * self.problem.m):
                values = self.load_partials(i, index)
                if self.slabs:
                    self.slabs.send(i, index, mg.tree_sum(values))
                else:
                    self.write(i, index, values)

    def finish(self, i: mg.Int) -> None:
        """By one warpgroup of its owner: write the result of tile i, when all have sent."""
        self.slabs.wait(i)
        for index in self.elements():
            with mg.when(index < ROWS * self.problem.m):
                self.write(i, index, self.slabs.load(i, index))

    def elements(self) -> list[mg.Int]:
        """This thread's share of a tile of y; may lie past its end."""
        return [self.thread + first for first in range(0, ROWS * self.problem.m, mg.WARPGROUP)]

    def load_partials(self, i: mg.Int, index: mg.Int) -> list:
        """What the warps have of an element of tile i."""
        stride, column, tile_row = 4 * self.layout.partial, index // ROWS, index % ROWS
        base = self.partials + (i & 1) * (self.tiles.warps * stride)
        base = base + ((column * COLUMN + tile_row) << 2)
        return [mem.load_float(base + warp * stride) for warp in range(self.tiles.warps)]

    def write(self, i: mg.Int, index: mg.Int, values: list) -> None:
        """Write an element of tile i, of which `values` are parts, if it is in y."""
        column, tile_row = index // ROWS, index % ROWS
        row = self.row(i) + tile_row
        with mg.when(row < self.problem.n):
            values = values + self.terms.load_residual(i, column, tile_row, row)
            value = self.terms.add(i, mg.tree_sum(values), column, tile_row, row)
            place = (column * self.problem.n + row).wide()
            mem.store(self.out + place * 2, mg.round_to(value, self.problem.dtype))

    def owns(self, i: mg.Int) -> mg.Value:
        """Whether this block writes tile i."""
        return self.slabs.owner(i).equals(self.slabs.rank)

    def run(self) -> None:
        warps = self.tiles.warps
        # Memory answers in order: what is needed first must be asked for first.
        code = pair_table.load_code(self.codebook)
        scale_table = self.ring.scales.load_table() if self.problem.double else []
        x = self.load_x_rows() if self.tiles.shared_x else self.load_x()
        self.ring.initialize()
        if self.slabs:
            with mg.when(mg.thread_index().equals(0)):
                self.slabs.initialize()
        with mg.when(self.warp.equals(0)):
            self.terms.copy_hidden()
        self.copy_panel(mg.Int(0), 0)
        pair_table.build(self.table, code, self.problem.dtype, warps)
        for unit in range(1, self.tiles.stages):  # when all warps have asked for their first
            i, step = divmod(unit, self.layout.steps)
            self.copy_panel(mg.Int(i), step)
        if self.problem.double:
            with mg.when(self.warp.equals(0)):
                self.ring.scales.store_table(scale_table)
        if self.tiles.shared_x:
            self.store_x_rows(x)
            x = []
        mg.sync_block()
        if self.slabs:
            mg.sync_cluster()

        def body(i: mg.Int, _: list) -> list:
            self.write_partial(i, self.multiply(i, x))
            mg.sync_block()
            if self.layout.together:
                # All at once, so that the memory sees whole rows of the tile: 1.0 us of 15.4.
                self.copy_ahead(i, 0)
            with mg.when(self.reduces(i)):
                self.reduce(i)
            if self.slabs:
                with mg.when(mg.both(mg.Int(0) < i, self.finishes(i - 1))):
                    self.finish(i - 1)
            return []

        mg.loop(self.count, [], body)
        if self.slabs:
            with mg.when(self.finishes(self.count - 1)):
                self.finish(self.count - 1)

    def reduces(self, i: mg.Int) -> mg.Value:
        """Whether this warpgroup sums the warps' partials of tile i."""
        return (self.warp >> 2).equals(i % (self.tiles.warps // 4))

    def finishes(self, i: mg.Int) -> mg.Value:
        """Whether it writes tile i, of several slabs."""
        return mg.both(self.reduces(i), self.owns(i))


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
        grid=(layout.groups,),
        grid_names=("block",),
        **cluster,
        num_threads=tiles.warps // 4,
        thread_name="warpgroup",
        scratch_types=[layout.scratch(tiles)],
        compiler_params=mg.COMPILER_PARAMS,
    )
    return lambda operands: kernel(*operands)
