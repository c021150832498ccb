"""Hopper matmul for decoding, M <= 16: each packed byte is read once, at the speed of the memory.

A block holds one slice of K (a "slab", split among its warps in panels of 256) and walks over tiles
of 16 weight rows. The fragments of x stay in registers for the whole kernel. Rows of packed bytes
come through a ring of bulk copies. A byte becomes a pair of 16-bit codes by one shared-memory lookup,
m16n8k16 products accumulate a scale block, and the block sum is multiplied by its float32 scale.
The same order of K on both sides: lane q of a quad owns bytes 4q..4q+3 of each 16, that is 8
consecutive k, so x is read in its natural order. Sums over warps and slabs have a fixed order.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels.matmul.config import DecodeTiles
from pallas_kernels.matmul.mosaic_scales import ScaleReader
from pallas_kernels.matmul.problem import Operands, Problem

ROWS = 16  # weight rows of a tile: the m of the mma
PANEL = 256  # k of a warp's step
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
        self.tiles = -(-problem.n // ROWS)
        self.groups = min(sms // tiles.slabs, self.tiles)  # blocks of a slab
        self.pitch = self.slab_panels * PANEL // 2 + ROW_PAD
        self.slot = ROWS * self.pitch
        self.partial = 8 * self.columns * COLUMN  # floats of one warp
        self.scales = max(1, PANEL // problem.block_size)  # of a row in a panel
        self.steps = -(-self.slab_panels // tiles.warps)  # panels of a warp

    def scratch(self, tiles: DecodeTiles) -> dict:
        return {
            "ring": plgpu.SMEM((tiles.stages * self.slot // 4,), jnp.int32),
            "table": plgpu.SMEM((mg.PAIR_TABLE_WORDS,), jnp.int32),
            "partials": plgpu.SMEM((2 * tiles.warps * self.partial,), jnp.float32),
            "scales": plgpu.SMEM((tiles.warps * self.steps * ROWS * self.scales,), jnp.float32),
            "barriers": plgpu.SMEM((2 * tiles.stages,), jnp.int32),
        }


def shared_bytes(problem: Problem, tiles: DecodeTiles) -> int:
    """Shared memory of a block."""
    scratch = Layout(problem, tiles, 132).scratch(tiles).values()
    return sum(-(-ref.shape[0] * 4 // 1024) * 1024 for ref in scratch)


class Block:
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
        self.scales = ScaleReader(problem, list(refs.scales), layer)
        self.x, self.codebook = mg.global_address(refs.x), mg.global_address(refs.codebook)
        self.ring, self.table, self.partials, self.parked = (
            mg.shared_address(scratch[name]) for name in ("ring", "table", "partials", "scales")
        )
        self.parked += self.warp * (4 * layout.steps * ROWS * layout.scales)
        self.barriers = mg.Barriers(scratch["barriers"], tiles.stages)

    def panel(self, step: int) -> mg.Int:
        """This warp's panel within the slab; may lie past its end."""
        return self.warp + step * self.tiles.warps

    def tile(self, i: mg.Int) -> mg.Int:
        """First weight row of this block's tile i."""
        return (self.first_tile + i * self.layout.groups) * ROWS

    def copy_tile(self, i: mg.Int) -> None:
        """Warp 0 starts the copy of tile i, a lane for each row."""
        start = (self.first_panel * (PANEL // 2)).at_most(self.problem.k // 2)
        size = (self.slab_panels * (PANEL // 2)).at_most(mg.Int(self.problem.k // 2) - start)
        slot = i % self.tiles.stages
        with mg.when(self.lane.equals(0)):
            self.barriers.expect(slot, size * ROWS)
        mg.sync_warp()
        with mg.when(self.lane < ROWS):
            row = (self.tile(i) + self.lane).at_most(self.problem.n - 1)
            source = self.packed + row.wide() * (self.problem.k // 2)
            target = self.ring + slot * self.layout.slot + self.lane * self.layout.pitch
            mg.copy_bulk(target, source, size, self.barriers.address(slot))

    def load_x(self) -> list[mg.Int]:
        """The mma B fragments of this warp's panels, zero where x has no row or column."""
        words, m, k = [], self.problem.m, self.problem.k
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
                    part = mg.load_words(self.x + (offset << 1).wide())
                    words += [mg.select(valid, word, 0) for word in part]
        return words

    def scale_places(self):
        """(row, step, block) of each scale that this lane fetches for its warp."""
        per_panel = ROWS * self.layout.scales
        for step in range(self.layout.steps):
            panel = (self.first_panel + self.panel(step)) * PANEL
            for first in range(0, per_panel, mg.WARP):
                index = (self.lane + first) % per_panel
                block = panel // self.problem.block_size + index % self.layout.scales
                place = index + step * per_panel
                yield index // self.layout.scales, block.at_most(self.problem.blocks - 1), place

    def fetch_scales(self, i: mg.Int) -> list:
        raw = []
        for row, block, _ in self.scale_places():
            row = (self.tile(i) + row).at_most(self.problem.n - 1)
            raw += self.scales.fetch(row, block)
        return raw

    def park_scales(self, raw: list) -> None:
        """Decode the fetched scales to where the whole warp reads them."""
        width = self.scales.registers
        for j, (_, _, place) in enumerate(self.scale_places()):
            scale = self.scales.decode(raw[j * width : (j + 1) * width])
            mg.store(self.parked + (place << 2), scale)
        mg.sync_warp()

    def multiply(self, slot: mg.Int, x: list[mg.Int]) -> list[list]:
        """This warp's partial product of a tile: 4 floats for each group of 8 columns."""
        acc = [[mg.zero()] * 4 for _ in range(self.layout.columns)]
        for step in range(self.layout.steps):
            size = self.layout.columns * CHUNKS * 4
            acc = self.multiply_panel(slot, step, x[step * size : (step + 1) * size], acc)
        return acc

    def multiply_panel(self, slot, step, x, acc):
        layout, dtype = self.layout, self.problem.dtype
        panel = self.panel(step).at_most(self.slab_panels - 1)
        packed = self.ring + slot * layout.slot + self.group * layout.pitch
        packed = packed + panel * (PANEL // 2) + (self.quad << 2)
        parked = self.parked + (self.group + step * ROWS) * (4 * layout.scales)
        words = [
            [mg.load_word(packed + (half * 8 * layout.pitch + chunk * 16)) for half in range(2)]
            for chunk in range(CHUNKS)
        ]
        scales = [
            mg.load_floats(parked + half * 8 * 4 * layout.scales, layout.scales)
            for half in range(2)
        ]
        for block in range(layout.scales):
            part = [[mg.zero()] * 4 for _ in range(layout.columns)]
            for chunk in range(
                CHUNKS * block // layout.scales, CHUNKS * (block + 1) // layout.scales
            ):
                top, bottom = (
                    mg.decode_word(word, self.table, self.lane << 2) for word in words[chunk]
                )
                for half in (0, 2):
                    a = [top[half], bottom[half], top[half + 1], bottom[half + 1]]
                    for column in range(layout.columns):
                        first = (column * CHUNKS + chunk) * 4 + half
                        part[column] = mg.mma(part[column], a, x[first : first + 2], dtype)
            acc = [
                [mg.fma(part[c][r], scales[r // 2][block], acc[c][r]) for r in range(4)]
                for c in range(layout.columns)
            ]
        return acc

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
            row = self.tile(i) + index % ROWS
            with mg.when(mg.both(index < count, row < self.problem.n)):
                self.reduce_one(i, index // ROWS, index % ROWS, row)

    def reduce_one(self, i, column, tile_row, row) -> None:
        stride = 4 * self.layout.partial
        base = self.partials + (i & 1) * (self.tiles.warps * stride)
        base = base + ((column * COLUMN + tile_row) << 2)
        values = [mg.load_float(base + warp * stride) for warp in range(self.tiles.warps)]
        place = (column * self.problem.n + row).wide()
        dtype = self.problem.dtype if self.tiles.slabs == 1 else jnp.float32
        value = mg.round_to(mg.tree_sum(values), dtype)
        mg.store(self.out + place * jnp.dtype(dtype).itemsize, value)

    def run(self) -> None:
        tiles, is_first = self.tiles, self.warp.equals(0)
        with mg.when(is_first):
            with mg.when(self.lane.equals(0)):
                self.barriers.initialize()
            mg.sync_warp()
            for i in range(tiles.stages):
                with mg.when(mg.Int(i) < self.count):
                    self.copy_tile(mg.Int(i))
        x, raw = self.load_x(), self.fetch_scales(mg.Int(0))
        mg.build_pair_table(
            self.table, self.codebook, self.problem.dtype, self.warp, tiles.warps, self.lane
        )
        mg.sync_block()

        def body(i: mg.Int, raw: list) -> list:
            upcoming = self.fetch_scales((i + 1).at_most(self.count - 1))
            self.park_scales(raw)
            slot = i % tiles.stages
            self.barriers.wait(slot, i // tiles.stages & 1)
            self.write_partial(i, self.multiply(slot, x))
            # The partials are published, and slot is free.
            mg.sync_block()
            with mg.when(mg.both(is_first, i + tiles.stages < self.count)):
                self.copy_tile(i + tiles.stages)
            with mg.when((self.warp >> 2).equals(i % (tiles.warps // 4))):
                self.reduce(i)
            return upcoming

        mg.loop(self.count, raw, body)


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
            Block(problem, tiles, layout, refs, out, scratch).run()

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
