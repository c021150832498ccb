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
from pallas_kernels.matmul.mosaic_terms import TermLayout, Terms
from pallas_kernels.matmul.problem import Operands, Problem, add_slabs

COLUMN = ROWS + 4  # floats between columns of a partial result: no bank conflict when it is written


class Layout:
    """Sizes that follow from the problem and the tiles."""

    def __init__(self, problem: Problem, tiles: DecodeTiles, sms: int):
        self.m, self.columns = problem.m, -(-problem.m // 8)  # groups of 8 rows of x
        self.panels = -(-problem.k // PANEL)
        self.slab_panels = -(-self.panels // tiles.slabs)  # of the largest slab
        self.steps = -(-self.slab_panels // tiles.warps)  # panels of a warp
        self.tiles = -(-problem.n // ROWS)
        self.groups = min(sms // tiles.slabs, self.tiles)  # blocks of a slab
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
        )


class _Block:
    """One thread's view of the kernel."""

    def __init__(self, context, problem, tiles, layout, refs: Operands, out, scratch):
        self.problem, self.tiles, self.layout = problem, tiles, layout
        self.ring = TensorPanels(context, layout.panel, refs, scratch)
        self.warp, self.lane = self.ring.warp, self.ring.lane
        self.group, self.quad = self.lane >> 2, self.lane & 3
        slab = mg.block_index() // layout.groups
        self.first_tile = mg.block_index() % layout.groups
        self.count = (mg.Int(layout.tiles + layout.groups - 1) - self.first_tile) // layout.groups
        self.first_panel = slab * layout.panels // tiles.slabs
        self.slab_panels = (slab + 1) * layout.panels // tiles.slabs - self.first_panel
        self.out = mem.global_address(out) + slab.wide() * (4 * problem.m * problem.n)
        self.x, self.codebook = mem.global_address(refs.x), mem.global_address(refs.codebook)
        self.together = tiles.together and layout.steps == 1
        self.table = mem.shared_address(scratch["table"])
        self.partials = mem.shared_address(scratch["partials"])
        own = refs, self.ring.layer, slab.equals(0)
        self.terms = Terms(problem, layout.terms, *own, scratch)
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
            with mg.when(mg.both(self.warp.equals(0), i < self.count)):
                self.terms.copy(i, self.row(i))
        slot = self.unit(i, step) % self.tiles.stages
        panel, last = (self.first_panel + p for p in (self.panel(step), self.slab_panels - 1))
        self.ring.start(slot, self.row(i), panel, i < self.count, last)

    def copy_ahead(self, i: mg.Int, step: int) -> None:
        """Start to copy the panel that takes the place of a panel of tile i."""
        tiles, step = divmod(step + self.tiles.stages, self.layout.steps)
        self.copy_panel(i + tiles, step)

    # x

    def load_x(self) -> list[tuple[mg.Value, list[mg.Int]]]:
        """Start to load the mma B fragments of this warp's panels: (where x has them, 4 words)."""
        parts = []
        for step in range(self.layout.steps):
            for column in range(self.layout.columns):
                for chunk in range(CHUNKS):
                    k = self.panel(step) * PANEL + (self.quad << 3) + chunk * CHUNK
                    parts.append(self.load_8(self.group + 8 * column, k))
        return parts

    def load_x_rows(self) -> list[tuple[mg.Value, list[mg.Int]]]:
        """Start to load x of this slab, for `store_x_rows`: each thread its share."""
        return [self.load_8(row, k) for row, k in self.x_places()]

    def store_x_rows(self, parts: list[tuple[mg.Value, list[mg.Int]]]) -> None:
        for (row, k), (valid, words) in zip(self.x_places(), parts):
            with mg.when(row < self.problem.m):
                words = [mg.select(valid, word, 0) for word in words]
                mem.store_words(self.x_rows + row * self.layout.x_row + (k << 1), words)

    def x_places(self) -> list[tuple[mg.Int, mg.Int]]:
        """(row, k) of each 8 elements that this thread brings; rows may lie past the end."""
        eights = (self.layout.x_row - 16) // 16
        count, threads = self.problem.m * eights, self.tiles.warps * mg.WARP
        places = [mg.thread_index() + first for first in range(0, count, threads)]
        return [(place // eights, place % eights << 3) for place in places]

    def load_8(self, row: mg.Int, k: mg.Int) -> tuple[mg.Value, list[mg.Int]]:
        """Start to load 8 elements of x, k counted from the slab's first; whether x has them."""
        place = self.first_panel * PANEL + k
        valid = mg.both(row < self.problem.m, place < self.problem.k)
        valid = mg.both(valid, k < self.slab_panels * PANEL)
        offset = mg.select(valid, row * self.problem.k + place, 0)
        return valid, mem.load_words(self.x + (offset << 1).wide())

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
                if not self.together:
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
        """One warpgroup sums the warps' partials of tile i in order and writes the result."""
        thread = mg.thread_index() % mg.WARPGROUP
        count = ROWS * self.problem.m
        for first in range(0, count, mg.WARPGROUP):
            index = thread + first
            row = self.row(i) + index % ROWS
            with mg.when(mg.both(index < count, row < self.problem.n)):
                self.reduce_one(i, index // ROWS, index % ROWS, row)

    def reduce_one(self, i: mg.Int, column: mg.Int, tile_row: mg.Int, row: mg.Int) -> None:
        stride = 4 * self.layout.partial
        base = self.partials + (i & 1) * (self.tiles.warps * stride)
        base = base + ((column * COLUMN + tile_row) << 2)
        values = [mem.load_float(base + warp * stride) for warp in range(self.tiles.warps)]
        place = (column * self.problem.n + row).wide()
        dtype, whole = self.problem.dtype, self.tiles.slabs == 1
        if whole:
            values += self.terms.load_residual(i, column, tile_row, row)
        value = self.terms.add(i, mg.tree_sum(values), column, tile_row, row)
        value = mg.round_to(value, dtype if whole else jnp.float32)
        mem.store(self.out + place * (2 if whole else 4), value)

    def run(self) -> None:
        warps = self.tiles.warps
        # Memory answers in order: what is needed first must be asked for first.
        code = pair_table.load_code(self.codebook)
        scale_table = self.ring.scales.load_table() if self.problem.double else []
        x = self.load_x_rows() if self.tiles.shared_x else self.load_x()
        self.ring.initialize()
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
        x = [[mg.select(valid, word, 0) for word in words] for valid, words in x]
        mg.sync_block()

        def body(i: mg.Int, _: list) -> list:
            self.write_partial(i, self.multiply(i, x))
            mg.sync_block()
            if self.together:
                # All at once, so that the memory sees whole rows of the tile: 1.0 us of 15.4.
                self.copy_ahead(i, 0)
            with mg.when((self.warp >> 2).equals(i % (warps // 4))):
                self.reduce(i)
            return []

        mg.loop(self.count, [], body)


@functools.cache
def build(problem: Problem, tiles: DecodeTiles, sms: int):
    """The kernel of a problem: a function of its `Operands` giving y [M, N]."""
    layout = Layout(problem, tiles, sms)
    shape = (problem.m, problem.n)
    out = jax.ShapeDtypeStruct(shape, problem.dtype)
    if tiles.slabs > 1:
        out = jax.ShapeDtypeStruct((tiles.slabs, *shape), jnp.float32)

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
        out_type=out,
        grid=(layout.groups * tiles.slabs,),
        grid_names=("block",),
        num_threads=tiles.warps // 4,
        thread_name="warpgroup",
        scratch_types=[layout.scratch(tiles)],
        compiler_params=mg.COMPILER_PARAMS,
    )

    def call(operands: Operands) -> jax.Array:
        y = kernel(*operands)
        return y if tiles.slabs == 1 else add_slabs(y, operands, problem.dtype)

    return call
