"""Hopper matmul for decoding, M <= 16: each packed byte is read once, at the speed of the memory.

A block holds one slice of K (a "slab", split among its warps in panels of 256) and walks over tiles
of 16 weight rows. The fragments of x stay in registers for the whole kernel. Rows of packed bytes
come through a ring of bulk copies. A byte becomes a pair of 16-bit codes by one shared-memory
lookup, m16n8k16 products accumulate a scale block, and the block sum is multiplied by its float32
scale. The order of K is the same on both sides: lane q of a quad owns bytes 4q..4q+3 of each 16,
that is 8 consecutive k, so x is read in its natural order. Sums have a fixed order.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels.matmul.config import DECODE_PANEL as PANEL
from pallas_kernels.matmul.config import DecodeTiles
from pallas_kernels.matmul.mosaic_scales import TABLE_BYTES, ScaleLayout, ScaleReader
from pallas_kernels.matmul.problem import Operands, Problem

ROWS = 16  # weight rows of a tile: the m of the mma
CHUNK = 32  # k of 16 packed bytes: two mma steps
CHUNKS = PANEL // CHUNK
COLUMN = ROWS + 4  # floats between columns of a partial result: no bank conflict when it is written
ROW_PAD = 16  # bytes between rows of a packed tile: rows g and g + 1 differ by 4 banks


class Layout:
    """Sizes that follow from the problem and the tiles."""

    def __init__(self, problem: Problem, tiles: DecodeTiles, sms: int):
        self.columns = -(-problem.m // 8)  # groups of 8 rows of x
        self.panels = -(-problem.k // PANEL)
        self.slab_panels = -(-self.panels // tiles.slabs)  # of the largest slab
        self.steps = -(-self.slab_panels // tiles.warps)  # panels of a warp
        self.tiles = -(-problem.n // ROWS)
        self.groups = min(sms // tiles.slabs, self.tiles)  # blocks of a slab
        self.per_panel = max(1, PANEL // problem.block_size)  # scales of a row in a panel
        span = min(problem.blocks, self.slab_panels * PANEL // problem.block_size + 1)
        granule = 16 if problem.double else 4  # scales in 16 bytes
        aligned = problem.blocks % granule == 0
        aligned = aligned and (tiles.slabs == 1 or self.per_panel % granule == 0)
        ragged = problem.k % PANEL != 0
        self.scales = ScaleLayout(problem, ROWS, span, aligned, ragged)
        self.pitch = self.slab_panels * PANEL // 2 + ROW_PAD
        self.slot = ROWS * self.pitch + self.scales.size
        self.partial = 8 * self.columns * COLUMN  # floats of one warp
        self.decoded = self.steps * ROWS * self.per_panel if problem.double else 0  # of one warp

    def scratch(self, tiles: DecodeTiles) -> dict:
        """Shared memory of a block, by name."""
        decoded = TABLE_BYTES // 4 + tiles.warps * self.decoded
        return {
            "ring": plgpu.SMEM((tiles.stages * self.slot // 4,), jnp.int32),
            "table": plgpu.SMEM((mg.PAIR_TABLE_WORDS,), jnp.int32),
            "partials": plgpu.SMEM((2 * tiles.warps * self.partial,), jnp.float32),
            "decoded": plgpu.SMEM((decoded,), jnp.float32),
            "barriers": plgpu.SMEM((2 * tiles.stages,), jnp.int32),
        }


class _Block:
    """One thread's view of the kernel."""

    def __init__(self, problem, tiles, layout, refs: Operands, out, scratch):
        self.problem, self.tiles, self.layout = problem, tiles, layout
        self.warp, self.lane = mg.warp_and_lane(mg.thread_index())
        self.group, self.quad = self.lane >> 2, self.lane & 3
        slab = mg.block_index() // layout.groups
        self.first_tile = mg.block_index() % layout.groups
        self.count = (mg.Int(layout.tiles + layout.groups - 1) - self.first_tile) // layout.groups
        self.first_panel = slab * layout.panels // tiles.slabs
        self.slab_panels = (slab + 1) * layout.panels // tiles.slabs - self.first_panel
        self.out = mg.global_address(out) + slab.wide() * (4 * problem.m * problem.n)
        layer = mg.Int(0)
        if problem.stacked:
            layer = mg.load_word(mg.global_address(refs.layer))
        self.packed = (
            mg.global_address(refs.packed)
            + layer.wide() * (problem.n * problem.k // 2)
            + (self.first_panel * (PANEL // 2)).wide()
        )
        last_k = ((self.first_panel + self.slab_panels) * PANEL).at_most(problem.k) - 1
        reader = ScaleReader(layout.scales, list(refs.scales), layer)
        self.scales = reader.between(self.first_panel * PANEL, last_k)
        self.x, self.codebook = mg.global_address(refs.x), mg.global_address(refs.codebook)
        self.ring, self.table, self.partials, self.scale_table = (
            mg.shared_address(scratch[name]) for name in ("ring", "table", "partials", "decoded")
        )
        self.decoded = self.scale_table + TABLE_BYTES + self.warp * (4 * layout.decoded)
        self.barriers = mg.Barriers(scratch["barriers"], tiles.stages)

    def slot(self, i: mg.Int) -> mg.Int:
        return self.ring + i % self.tiles.stages * self.layout.slot

    def panel(self, step: int) -> mg.Int:
        """This warp's panel within the slab; may lie past its end."""
        return self.warp + step * self.tiles.warps

    def row(self, i: mg.Int, tile_row: mg.Int) -> mg.Int:
        """The weight row of a row of tile i; the last one again past the end."""
        first = (self.first_tile + i * self.layout.groups) * ROWS
        return (first + tile_row).at_most(self.problem.n - 1)

    def copy_tile(self, i: mg.Int) -> None:
        """Start the copy of tile i: each warp its share of the rows, so that none is late."""
        for first in range(0, ROWS, self.tiles.warps):
            tile_row = self.warp + first
            with mg.when(mg.both(self.lane.equals(0), tile_row < ROWS)):
                self.copy_row(i, tile_row)
        if self.problem.double:
            with mg.when(mg.thread_index().equals(0)):
                self.copy_groups(i)

    def copy_row(self, i: mg.Int, tile_row: mg.Int) -> None:
        row, stage = self.row(i, tile_row), i % self.tiles.stages
        barrier = self.barriers.address(stage)
        start = self.first_panel * (PANEL // 2)
        size = (self.slab_panels * (PANEL // 2)).at_most(mg.Int(self.problem.k // 2) - start)
        scales, scales_size = self.scales.row_window(row)
        self.barriers.expect(stage, size + scales_size)
        packed = self.packed + row.wide() * (self.problem.k // 2)
        mg.copy_bulk(self.slot(i) + tile_row * self.layout.pitch, packed, size, barrier)
        target = self.slot(i) + ROWS * self.layout.pitch + tile_row * self.layout.scales.pitch
        mg.copy_bulk(target, scales, scales_size, barrier)

    def copy_groups(self, i: mg.Int) -> None:
        """The second level of the scales of tile i."""
        stage = i % self.tiles.stages
        source, size = self.scales.group_window(
            self.row(i, mg.Int(0)), self.row(i, mg.Int(ROWS - 1))
        )
        self.barriers.expect(stage, size)
        target = self.slot(i) + ROWS * (self.layout.pitch + self.layout.scales.pitch)
        mg.copy_bulk(target, source, size, self.barriers.address(stage))

    def load_x(self) -> list[tuple[mg.Value, list[mg.Int]]]:
        """Start to load the mma B fragments of this warp's panels: (where x has them, 4 words)."""
        parts, m, k = [], self.problem.m, self.problem.k
        for step in range(self.layout.steps):
            panel = self.panel(step)
            inside = panel < self.slab_panels
            first = (self.first_panel + panel) * PANEL + (self.quad << 3)
            for column in range(self.layout.columns):
                row = self.group + 8 * column
                for chunk in range(CHUNKS):
                    place = first + chunk * CHUNK
                    valid = mg.both(mg.both(row < m, place < k), inside)
                    offset = mg.select(valid, row * k + place, 0)
                    parts.append((valid, mg.load_words(self.x + (offset << 1).wide())))
        return parts

    def multiply(self, i: mg.Int, x: list[mg.Int]) -> list[list]:
        """This warp's partial product of tile i: 4 floats for each group of 8 columns."""
        acc = [[mg.zero()] * 4 for _ in range(self.layout.columns)]
        size = self.layout.columns * CHUNKS * 4
        for step in range(self.layout.steps):
            acc = self.multiply_panel(i, step, x[step * size : (step + 1) * size], acc)
        return acc

    def multiply_panel(self, i: mg.Int, step: int, x: list[mg.Int], acc: list[list]) -> list[list]:
        layout = self.layout
        panel = self.panel(step).at_most(self.slab_panels - 1)
        address = self.slot(i) + self.group * layout.pitch + panel * (PANEL // 2) + (self.quad << 2)
        words = [
            [mg.load_word(address + (half * 8 * layout.pitch + chunk * 16)) for half in range(2)]
            for chunk in range(CHUNKS)
        ]
        pending = self.begin_scales(i, step, panel)
        per_block = CHUNKS // layout.per_panel
        scales = None
        for block in range(layout.per_panel):
            part = [[mg.zero()] * 4 for _ in range(layout.columns)]
            for chunk in range(block * per_block, (block + 1) * per_block):
                self.multiply_chunk(words[chunk], x[4 * chunk :], part)
            # Late, so that the first products hide the latency of the scales.
            scales = scales or self.finish_scales(i, step, panel, pending)
            for total, new in zip(acc, part):
                total[:] = [mg.fma(new[r], scales[r // 2][block], total[r]) for r in range(4)]
        return acc

    def multiply_chunk(self, words: list[mg.Int], x: list[mg.Int], part: list[list]) -> None:
        """Add the products of 32 k to `part`; x starts at the words of the first columns."""
        top, bottom = (mg.decode_word(word, self.table, self.lane << 2) for word in words)
        for half in (0, 2):
            a = [top[half], bottom[half], top[half + 1], bottom[half + 1]]
            for column, total in enumerate(part):
                first = 4 * CHUNKS * column + half
                total[:] = mg.mma(total, a, x[first : first + 2], self.problem.dtype)

    def first_column(self, panel: mg.Int) -> mg.Int:
        """The first scale of a panel, counted from the slab's first."""
        block = (self.first_panel + panel) * PANEL // self.problem.block_size
        return block - self.scales.first

    def begin_scales(self, i: mg.Int, step: int, panel: mg.Int) -> list:
        """Start to decode double-quantized scales, each lane its share of the warp's."""
        if not self.problem.double:
            return []
        tile = self.slot(i) + ROWS * self.layout.pitch
        pending = []
        for first in range(0, ROWS * self.layout.per_panel, mg.WARP):
            index = (self.lane + first) % (ROWS * self.layout.per_panel)
            tile_row = index // self.layout.per_panel
            column = self.first_column(panel) + index % self.layout.per_panel
            column = column.at_most(self.scales.count - 1)
            rows = self.row(i, tile_row), self.row(i, mg.Int(0))
            raw = self.scales.load_raw(tile, tile_row, *rows, column)
            pending.append((index + step * ROWS * self.layout.per_panel, raw))
        return pending

    def finish_scales(self, i: mg.Int, step: int, panel: mg.Int, pending: list) -> list[list]:
        """The scales of rows `group` and `group + 8` in a panel."""
        count = self.layout.per_panel
        rows = [self.group, self.group + 8]
        if not self.problem.double:
            tile, column = self.slot(i) + ROWS * self.layout.pitch, self.first_column(panel)
            return [self.scales.read(tile, r, self.row(i, r), column, count) for r in rows]
        for index, raw in pending:
            mg.store(self.decoded + (index << 2), self.scales.decode(raw, self.scale_table))
        mg.sync_warp()
        return [mg.load_floats(self.decoded + (r + step * ROWS) * (4 * count), count) for r in rows]

    def write_partial(self, i: mg.Int, acc: list[list]) -> None:
        buffer = (i & 1) * self.tiles.warps + self.warp
        base = self.partials + buffer * (4 * self.layout.partial)
        base = base + ((self.quad * (2 * COLUMN) + self.group) << 2)
        for column, values in enumerate(acc):
            for r, value in enumerate(values):
                offset = (8 * column + r % 2) * COLUMN + 8 * (r // 2)
                mg.store(base + 4 * offset, value)

    def reduce(self, i: mg.Int) -> None:
        """One warpgroup sums the warps' partials of tile i in order and writes the result."""
        thread = mg.thread_index() % mg.WARPGROUP
        count = ROWS * self.problem.m
        for first in range(0, count, mg.WARPGROUP):
            index = thread + first
            row = (self.first_tile + i * self.layout.groups) * ROWS + index % ROWS
            with mg.when(mg.both(index < count, row < self.problem.n)):
                self.reduce_one(i, index // ROWS, index % ROWS, row)

    def reduce_one(self, i: mg.Int, column: mg.Int, tile_row: mg.Int, row: mg.Int) -> None:
        stride = 4 * self.layout.partial
        base = self.partials + (i & 1) * (self.tiles.warps * stride)
        base = base + ((column * COLUMN + tile_row) << 2)
        values = [mg.load_float(base + warp * stride) for warp in range(self.tiles.warps)]
        place = (column * self.problem.n + row).wide()
        dtype = self.problem.dtype if self.tiles.slabs == 1 else jnp.float32
        value = mg.round_to(mg.tree_sum(values), dtype)
        mg.store(self.out + place * jnp.dtype(dtype).itemsize, value)

    def run(self) -> None:
        stages, warps = self.tiles.stages, self.tiles.warps
        with mg.when(mg.thread_index().equals(0)):
            self.barriers.initialize(ROWS + self.problem.double)
        code = mg.load_code(self.codebook)
        scale_table = self.scales.load_table() if self.problem.double else []
        mg.sync_block()
        for i in range(stages):
            with mg.when(mg.Int(i) < self.count):
                self.copy_tile(mg.Int(i))
        # The loads above and these overlap: nothing waits for one before the last has started.
        x = self.load_x()
        mg.build_pair_table(self.table, code, self.problem.dtype, warps)
        if self.problem.double:
            with mg.when(self.warp.equals(0)):
                self.scales.store_table(self.scale_table, scale_table)
        x = [mg.select(valid, word, 0) for valid, words in x for word in words]
        mg.sync_block()

        def body(i: mg.Int, _) -> list:
            self.barriers.wait(i % stages, i // stages & 1)
            self.write_partial(i, self.multiply(i, x))
            # The partials are published, and the slot is free.
            mg.sync_block()
            with mg.when(i + stages < self.count):
                self.copy_tile(i + stages)
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

    def qjax_matmul_decode(x, packed, scales, codebook, layer, out, scratch):
        refs = Operands(x, packed, scales, codebook, layer)
        types = jax.tree.map(lambda _: plgpu.RefType(), (refs, out, scratch))

        @plgpu.inline_mgpu(arg_types=types)
        def body(_, refs, out, scratch):
            _Block(problem, tiles, layout, refs, out, scratch).run()

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
        return y if tiles.slabs == 1 else y.sum(axis=0).astype(problem.dtype)

    return call
