"""Hopper matmul for small batches, 16 < M <= 128: y^T = W x^T, W decoded into registers.

A block holds 128 weight rows and one slice of K (a "slab"). Two warpgroups, a team, take 64 rows
each, two more the same rows: the teams take turns in the panels of 256 k. A warpgroup decodes part
of a panel into the registers of wgmma's left operand, multiplied by the scales in x's dtype, while
the part before is multiplied. x is the right operand, in shared memory: each team has a ring of
parts, and its warps take turns to refill it. x is reordered first, so that the 8 consecutive k of a
packed word fall where a lane's registers need them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels import mosaic_table as pair_table
from pallas_kernels.matmul.config import MID_ROWS as ROWS
from pallas_kernels.matmul.config import PANEL, MidTiles
from pallas_kernels.matmul.mosaic_panels import CHUNK, LanePanels, PanelLayout
from pallas_kernels.matmul.problem import Operands, Problem

WARPS = 16
TEAM = 8  # warps
DEPTH = 64  # k that a warpgroup decodes and multiplies at once
THREADS = WARPS * mg.WARP
OUT_PITCH = ROWS + 4  # floats between columns of a result in shared memory


class Layout:
    """Sizes that follow from the problem and the tiles."""

    def __init__(self, problem: Problem, tiles: MidTiles):
        self.columns = -(-problem.m // 8) * 8
        self.row_tiles = -(-problem.n // ROWS)
        self.panels = -(-problem.k // PANEL)
        self.panel = PanelLayout(problem, WARPS, tiles.stages)
        self.parts = PANEL // tiles.x_depth  # of x in a panel
        self.x_part = tiles.x_depth * self.columns * 2  # bytes
        self.out_columns = min(self.columns, 32 if self.columns <= 32 else 64)

    def scratch(self, tiles: MidTiles) -> dict:
        """Shared memory of a block, by name."""
        ring = 2 * tiles.x_stages * self.x_part // 4
        return self.panel.scratch() | {
            "x": plgpu.SMEM((max(ring, 2 * self.out_columns * OUT_PITCH),), jnp.int32),
            "table": plgpu.SMEM((pair_table.WORDS,), jnp.int32),
            "x_barriers": plgpu.SMEM((2 * 4 * tiles.x_stages,), jnp.int32),
        }


class _Block:
    """One thread's view of the kernel."""

    def __init__(self, problem, tiles, layout, refs: Operands, out, scratch):
        self.problem, self.tiles, self.layout = problem, tiles, layout
        self.thread = mg.thread_index()
        self.ring = LanePanels(layout.panel, refs, scratch)
        self.warp, self.lane = self.ring.warp, self.ring.lane
        self.group, self.quad = self.lane >> 2, self.lane & 3
        self.team, self.warp_row = self.warp // TEAM, self.warp % TEAM * 16
        slab = mg.block_index() // layout.row_tiles
        self.first_row = mg.block_index() % layout.row_tiles * ROWS
        first, end = (s * layout.panels // tiles.slabs for s in (slab, slab + 1))
        self.first_panel = first + self.team
        self.count = (end - first + 1 - self.team) >> 1  # panels of the team
        self.out = mem.global_address(out) + slab.wide() * (4 * problem.m * problem.n)
        self.x, self.codebook = mem.global_address(refs.x), mem.global_address(refs.codebook)
        self.table, x_ring = mem.shared_address(scratch["table"]), mem.shared_address(scratch["x"])
        self.out_stage = x_ring
        self.x_ring = x_ring + self.team * (tiles.x_stages * layout.x_part)
        # The team's: of each part of x when it is full, then when it is empty.
        count = 2 * tiles.x_stages
        self.barriers = mem.Barriers(scratch["x_barriers"], count, self.team * count)

    # Copies

    def panel(self, i: mg.Int) -> mg.Int:
        """The team's panel i, in K."""
        return self.first_panel + (i << 1)

    def copy_panel(self, i: mg.Int) -> None:
        """Start to copy this warp's part of panel i."""
        row, slot = self.first_row + self.warp_row, i % self.tiles.stages
        self.ring.start(slot, row, self.panel(i), i < self.count)

    def copy_x(self, part: mg.Int) -> None:
        """By one thread of the team: start to copy a part of x."""
        size, slot = mg.Int(self.layout.x_part), part % self.tiles.x_stages
        parts = self.layout.parts
        place = self.panel(part // parts) * parts + part % parts
        source = self.x + place.wide() * self.layout.x_part
        self.barriers.expect(slot, size)
        target = self.x_ring + slot * self.layout.x_part
        mem.copy_bulk(target, source, size, self.barriers.address(slot))

    def leave(self, part: mg.Int) -> None:
        """Leave a part of x; a warp in turn refills the place of one that all have left.

        With 3 stages or more that is the part before, so that nobody waits. With 2 it is this one:
        the next must be on its way before anyone waits for it.
        """
        stages, lag = self.tiles.x_stages, min(1, self.tiles.x_stages - 2)
        mg.sync_warp()
        with mg.when(self.lane.equals(0)):
            self.barriers.arrive(part % stages + stages)
            turn = (self.warp % TEAM).equals(part % TEAM)
            wanted = part + (stages - lag) < self.count * self.layout.parts
            with mg.when(mg.both(mg.both(turn, wanted), mg.Int(lag) < part + 1)):
                left = part - lag
                self.barriers.wait(left % stages + stages, left // stages & 1)
                self.copy_x(left + stages)

    # Products

    def run_panel(self, i: mg.Int, acc: list) -> list:
        """Multiply the team's panel i, each part while the next is decoded."""
        slot, x_depth = i % self.tiles.stages, self.tiles.x_depth
        row, column = self.first_row + self.warp_row, self.ring.first_scale(self.panel(i))
        self.ring.scales.decode(self.ring.scales.load(slot, row, column))
        scales = self.ring.scales.read(slot, 0, self.layout.panel.scales.columns)
        scales = [[mg.pack_pair(s, s, self.problem.dtype) for s in row] for row in scales]
        a = self.decode_part(slot, 0, scales)
        for k in range(0, PANEL, DEPTH):
            part = i * self.layout.parts + k // x_depth
            acc = self.start_part(part, k % x_depth, a, acc)
            upcoming = []
            if k + DEPTH < PANEL:
                upcoming = self.decode_part(slot, k + DEPTH, scales)
            if k + 2 * DEPTH == PANEL:  # the panel is read
                mg.sync_warp()
                self.copy_panel(i + self.tiles.stages)
            acc = mg.wgmma_finish(acc, a)
            if (k + DEPTH) % x_depth == 0:
                self.leave(part)
            a = upcoming
        return acc

    def decode_part(self, slot: mg.Int, k: int, scales: list[list[mg.Int]]) -> list[mg.Int]:
        """The left operand of a panel's part from k on: 4 words of pairs for each 16 k."""
        words = self.ring.words(slot, k // CHUNK, DEPTH // CHUNK)
        a = []
        for c, pair in enumerate(words):
            column = (k + c * CHUNK) // self.problem.block_size
            top, bottom = (self.decode(w, row[column]) for w, row in zip(pair, scales))
            a += [top[0], bottom[0], top[1], bottom[1], top[2], bottom[2], top[3], bottom[3]]
        return a

    def decode(self, word: mg.Int, scale: mg.Int) -> list[mg.Int]:
        pairs = pair_table.decode_word(word, self.table, self.lane << 2)
        return [mg.mul_pairs(pair, scale, self.problem.dtype) for pair in pairs]

    def start_part(self, part: mg.Int, k: int, a: list[mg.Int], acc: list) -> list:
        """Multiply by the x of a part, from its k on."""
        stages, columns = self.tiles.x_stages, self.layout.columns
        if k == 0:
            self.barriers.wait(part % stages, part // stages & 1)
        x = self.x_ring + part % stages * self.layout.x_part + k * columns * 2
        b = mg.matrix_descriptor(x, 16 * columns, 128)
        return mg.wgmma_start(acc, a, b, 2 * columns, self.problem.dtype)

    # The result

    def write(self, acc: list) -> None:
        """Sum the two halves of k through shared memory and store, some columns at a time."""
        width = self.layout.out_columns
        for first in range(0, self.layout.columns, width):
            mg.sync_block()
            base = self.out_stage + self.team * (4 * width * OUT_PITCH)
            base = base + (self.quad * (2 * OUT_PITCH) + self.warp_row + self.group << 2)
            for column in range(first, min(first + width, self.layout.columns), 8):
                for r in range(4):
                    place = (column - first + r % 2) * OUT_PITCH + 8 * (r // 2)
                    mem.store(base + 4 * place, acc[column // 2 + r])
            mg.sync_block()
            self.store_columns(first, min(width, self.problem.m - first))

    def store_columns(self, first: int, count: int) -> None:
        dtype = self.problem.dtype if self.tiles.slabs == 1 else jnp.float32
        tile_row = self.thread & (ROWS - 1)
        row = self.first_row + tile_row
        for start in range(0, count, THREADS // ROWS):
            column = (self.thread >> 7) + start
            with mg.when(mg.both(row < self.problem.n, column < count)):
                address = self.out_stage + (column * OUT_PITCH + tile_row << 2)
                other = address + 4 * self.layout.out_columns * OUT_PITCH
                value = mg.add(mem.load_float(address), mem.load_float(other))
                place = ((column + first) * self.problem.n + row).wide()
                target = self.out + place * jnp.dtype(dtype).itemsize
                mem.store(target, mg.round_to(value, dtype))

    def run(self) -> None:
        # Memory answers in order: what is needed first must be asked for first.
        code = pair_table.load_code(self.codebook)
        table = self.ring.scales.load_table() if self.problem.double else []
        stages = self.tiles.x_stages
        with mg.when(mg.both((self.warp % TEAM).equals(0), self.lane.equals(0))):
            self.barriers.initialize(1, [TEAM] * stages)
            for part in range(min(stages, self.layout.parts)):
                with mg.when(mg.Int(0) < self.count):
                    self.copy_x(mg.Int(part))
        mg.sync_warp()
        self.copy_panel(mg.Int(0))
        pair_table.build(self.table, code, self.problem.dtype, WARPS)
        with mg.when(mg.both((self.warp % TEAM).equals(0), self.lane.equals(0))):
            for part in range(self.layout.parts, stages):
                with mg.when(mg.Int(part) < self.count * self.layout.parts):
                    self.copy_x(mg.Int(part))
        mg.sync_warp()
        for i in range(1, self.tiles.stages):
            self.copy_panel(mg.Int(i))
        if self.problem.double:
            with mg.when(self.warp.equals(0)):
                self.ring.scales.store_table(table)
        mg.sync_block()
        acc = [mg.zero()] * (self.layout.columns // 2)
        self.write(mg.loop(self.count, acc, self.run_panel))


def arrange(x: jax.Array) -> jax.Array:
    """Reorder x [M, K] for wgmma: int32 [K' / 8, M', 4] with M' and K' rounded up to 8 and 256.

    Within each 32 k, word 4q + j (k = 8q + 2j) of a row goes to block j, place q: lane q of a quad
    decodes the 8 k of one packed word, and block j is what its j-th pair of codes meets.
    """
    m, k = x.shape
    words = jax.lax.bitcast_convert_type(x.reshape(m, k // 2, 2), jnp.int32)
    words = jnp.pad(words, ((0, -m % 8), (0, -k % PANEL // 2)))
    blocks = words.reshape(words.shape[0], -1, 4, 4).transpose(1, 3, 0, 2)
    return blocks.reshape(-1, words.shape[0], 4)


@functools.cache
def build(problem: Problem, tiles: MidTiles):
    """The kernel of a problem: a function of its `Operands` giving y [M, N]."""
    layout = Layout(problem, tiles)
    shape = (problem.m, problem.n)
    out = jax.ShapeDtypeStruct(shape, problem.dtype)
    if tiles.slabs > 1:
        out = jax.ShapeDtypeStruct((tiles.slabs, *shape), jnp.float32)

    def qjax_matmul_mid(x, packed, scales, codebook, layer, out, scratch):
        refs = Operands(x, packed, scales, codebook, layer)
        types = jax.tree.map(lambda _: plgpu.RefType(), (refs, out, scratch))

        @plgpu.inline_mgpu(arg_types=types)
        def body(context, refs, out, scratch):
            _Block(problem, tiles, layout, refs, out, scratch).run()

        body(refs, out, scratch)

    kernel = plgpu.kernel(
        qjax_matmul_mid,
        out_type=out,
        grid=(layout.row_tiles * tiles.slabs,),
        grid_names=("block",),
        num_threads=WARPS // 4,
        thread_name="warpgroup",
        scratch_types=[layout.scratch(tiles)],
        compiler_params=mg.COMPILER_PARAMS,
    )

    def call(operands: Operands) -> jax.Array:
        y = kernel(*operands._replace(x=arrange(operands.x)))
        return y if tiles.slabs == 1 else y.sum(axis=0).astype(problem.dtype)

    return call
