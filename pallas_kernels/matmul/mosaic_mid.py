"""Hopper matmul for small batches, 16 < M <= 128: y^T = W x^T, W decoded into registers.

A block holds 128 weight rows and one slice of K (a "slab"). Two warpgroups take 64 rows each, two
more the same rows on the other half of each stage of 256 k. A warpgroup decodes 64 or 128 k into
the registers of wgmma's left operand, multiplied by the scales in x's dtype. x is the right operand
in shared memory. It is reordered first, so that the 8 consecutive k of a packed word fall where a
lane's registers need them. The warps take turns to start the next copies.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels.matmul.config import MID_ROWS as ROWS
from pallas_kernels.matmul.config import MID_STAGE as STAGE
from pallas_kernels.matmul.config import MidTiles
from pallas_kernels.matmul.mosaic_scales import TABLE_BYTES, ScaleLayout, ScaleReader
from pallas_kernels.matmul.problem import Operands, Problem

CHUNK = 32  # k of 16 packed bytes
WARPS = 16
THREADS = WARPS * mg.WARP
STAGE_BYTES = STAGE // 2
SWIZZLE = 128  # of packed rows: 16-byte chunk c of row r lies at c ^ (r & 7)
OUT_PITCH = ROWS + 4  # floats between columns of a result in shared memory


class Layout:
    """Sizes that follow from the problem and the tiles."""

    def __init__(self, problem: Problem, tiles: MidTiles):
        self.columns = -(-problem.m // 8) * 8
        self.row_tiles = -(-problem.n // ROWS)
        self.steps = -(-problem.k // STAGE)
        self.window = tiles.window // STAGE  # stages that share a table of scales
        block = problem.block_size
        self.span = max(1, tiles.window // block) + (block > STAGE)
        granule = 16 if problem.double else 4  # scales in 16 bytes
        aligned = problem.blocks % granule == 0 and STAGE % (granule * block) == 0
        self.scales = ScaleLayout(problem, ROWS, self.span, aligned, True)
        self.scale_pitch = -(-self.span // 8) * 8 + 4  # words of a decoded row: 8 rows, 8 banks
        self.x_stage = STAGE // 8 * self.columns * 16
        self.out_columns = min(self.columns, 32 if self.columns <= 32 else 64)

    def scratch(self, tiles: MidTiles) -> dict:
        """Shared memory of a block, by name."""
        ring = tiles.stages * self.x_stage // 4
        return {
            "x": plgpu.SMEM((max(ring, 2 * self.out_columns * OUT_PITCH),), jnp.int32),
            "packed": plgpu.SMEM((tiles.stages, ROWS, STAGE_BYTES), jnp.uint8),
            "table": plgpu.SMEM((mg.PAIR_TABLE_WORDS,), jnp.int32),
            "raw": plgpu.SMEM((self.scales.size // 4,), jnp.int32),
            "scales": plgpu.SMEM((ROWS * self.scale_pitch,), jnp.int32),
            "scale_table": plgpu.SMEM((TABLE_BYTES // 4,), jnp.float32),
            "barriers": plgpu.SMEM((2 * (2 * tiles.stages + 1),), jnp.int32),
        }


class _Block:
    """One thread's view of the kernel."""

    def __init__(self, context, problem, tiles, layout, refs: Operands, out, scratch):
        self.context, self.problem, self.tiles, self.layout = context, problem, tiles, layout
        self.thread = mg.thread_index()
        self.warp, self.lane = mg.warp_and_lane(self.thread)
        self.group, self.quad = self.lane >> 2, self.lane & 3
        self.half = self.warp >> 3  # of the k of a stage
        self.warp_row = (self.warp & 7) << 4
        slab = mg.block_index() // layout.row_tiles
        self.first_row = mg.block_index() % layout.row_tiles * ROWS
        self.first_step = slab * layout.steps // tiles.slabs
        self.count = (slab + 1) * layout.steps // tiles.slabs - self.first_step
        self.out = mg.global_address(out) + slab.wide() * (4 * problem.m * problem.n)
        self.layer = mg.Int(0)
        if problem.stacked:
            self.layer = mg.load_word(mg.global_address(refs.layer))
        self.reader = ScaleReader(layout.scales, list(refs.scales), self.layer)
        self.packed_source, self.packed = refs.packed, scratch["packed"]
        self.x, self.codebook = mg.global_address(refs.x), mg.global_address(refs.codebook)
        names = ("x", "table", "raw", "scales", "scale_table")
        self.x_ring, self.table, self.raw, self.scales, self.scale_table = (
            mg.shared_address(scratch[name]) for name in names
        )
        self.packed_ring = mg.shared_address(self.packed)
        # Of each stage when it is full, of the scales, of each stage when it is empty.
        self.barriers = mg.Barriers(scratch["barriers"], 2 * tiles.stages + 1)
        self.scale_barrier = mg.Int(tiles.stages)

    # Copies

    def copy_stage(self, step: mg.Int) -> None:
        """By one thread: start the copies of a stage."""
        slot, place = step % self.tiles.stages, self.first_step + step
        barrier = self.barriers.address(slot)
        self.barriers.expect(slot, mg.Int(self.layout.x_stage))
        source = self.x + place.wide() * self.layout.x_stage
        target = self.x_ring + slot * self.layout.x_stage
        mg.copy_bulk(target, source, mg.Int(self.layout.x_stage), barrier)
        start = [self.layer] if self.problem.stacked else []
        start += [self.first_row, place * STAGE_BYTES]
        target, shape = mg.element(self.packed, slot), (ROWS, STAGE_BYTES)
        reference = self.barriers.reference(slot)
        mg.copy_tensor(self.context, self.packed_source, target, start, shape, reference, SWIZZLE)

    def window_reader(self, window: mg.Int) -> ScaleReader:
        first = (self.first_step + window * self.layout.window) * STAGE
        end = (self.first_step + self.count) * STAGE
        end = (first + self.layout.window * STAGE).at_most(end).at_most(self.problem.k)
        return self.reader.between(first, end - 1)

    def row(self, tile_row: mg.Int) -> mg.Int:
        return (self.first_row + tile_row).at_most(self.problem.n - 1)

    def copy_scales(self, window: mg.Int) -> None:
        """Start the copies of the scales of a window: each warp its share of the rows."""
        reader, share = self.window_reader(window), ROWS // WARPS
        with mg.when(self.lane < share):
            tile_row = self.warp * share + self.lane
            source, size = reader.row_window(self.row(tile_row))
            self.copy_bytes(tile_row * self.layout.scales.pitch, source, size)
        if self.problem.double:
            with mg.when(self.thread.equals(THREADS - 1)):
                rows = self.row(mg.Int(0)), self.row(mg.Int(ROWS - 1))
                self.copy_bytes(
                    mg.Int(ROWS * self.layout.scales.pitch), *reader.group_window(*rows)
                )

    def copy_bytes(self, place: mg.Int, source: mg.Int, size: mg.Int) -> None:
        self.barriers.expect(self.scale_barrier, size)
        barrier = self.barriers.address(self.scale_barrier)
        mg.copy_bulk(self.raw + place, source, size, barrier)

    def decode_scales(self, window: mg.Int) -> None:
        """Turn a window's scales into pairs of x's dtype: 8 rows and 4 columns a warp at a time."""
        reader = self.window_reader(window)
        tile_row = (self.warp << 3) + self.group
        row = self.row(tile_row)
        columns = [
            (self.quad + first).at_most(self.layout.span - 1)
            for first in range(0, self.layout.span, 4)
        ]
        scales = [self.load_scale(reader, tile_row, row, column) for column in columns]
        for column, scale in zip(columns, scales):
            target = self.scales + (tile_row * self.layout.scale_pitch + column << 2)
            mg.store(target, mg.pack_pair(scale, scale, self.problem.dtype))

    def load_scale(self, reader: ScaleReader, tile_row, row, column):
        if not self.problem.double:
            return reader.read(self.raw, tile_row, row, column, 1)[0]
        column = column.at_most(reader.count - 1)
        raw = reader.load_raw(self.raw, tile_row, row, self.row(mg.Int(0)), column)
        return reader.decode(raw, self.scale_table)

    # Products

    def decode_part(self, step: mg.Int, part: int, first_block: mg.Int) -> list[mg.Int]:
        """The left operand of this warpgroup's part of a stage: 4 words of pairs for each 16 k."""
        slot, depth = step % self.tiles.stages, self.tiles.depth
        packed = self.packed_ring + slot * (ROWS * STAGE_BYTES)
        packed = packed + ((self.warp_row + self.group) << 7) + (self.quad << 2)
        scales = self.scales + ((self.warp_row + self.group) * self.layout.scale_pitch << 2)
        first_k = (self.first_step + step) * STAGE + (self.half << 7) + part * depth
        words = []
        for c in range(depth // CHUNK):
            chunk = (self.half << 2) + part * (depth // CHUNK) + c  # of the packed row
            column = (first_k + c * CHUNK) // self.problem.block_size - first_block
            for half in range(2):
                place = packed + ((chunk ^ self.group) << 4) + half * 8 * STAGE_BYTES
                scale = scales + (column << 2) + half * 8 * 4 * self.layout.scale_pitch
                words.append((mg.load_word(place), mg.load_word(scale)))
        a = []
        for top, bottom in zip(words[0::2], words[1::2]):
            top, bottom = self.decode(*top), self.decode(*bottom)
            a += [top[0], bottom[0], top[1], bottom[1], top[2], bottom[2], top[3], bottom[3]]
        return a

    def decode(self, word: mg.Int, scale: mg.Int) -> list[mg.Int]:
        pairs = mg.decode_word(word, self.table, self.lane << 2)
        return [mg.mul_pairs(pair, scale, self.problem.dtype) for pair in pairs]

    def start_part(self, step: mg.Int, part: int, a: list[mg.Int], acc: list) -> list:
        columns = self.layout.columns
        k = (self.half << 7) + part * self.tiles.depth  # within the stage
        slot = step % self.tiles.stages
        x = self.x_ring + slot * self.layout.x_stage + k * (2 * columns)
        b = mg.matrix_descriptor(x, 16 * columns, 128)
        return mg.wgmma_start(acc, a, b, 2 * columns, self.problem.dtype)

    def wait_stage(self, step: mg.Int) -> None:
        self.barriers.wait(step % self.tiles.stages, step // self.tiles.stages & 1)

    def run_stage(self, step: mg.Int, last: mg.Int, first_block: mg.Int, carry: list) -> list:
        """Multiply a stage whose first part is decoded, and decode the first part of the next.

        `last` is the last stage of the window: its next one is itself again, to no effect.
        """
        size, parts = self.layout.columns // 2, STAGE // 2 // self.tiles.depth
        acc, a = carry[:size], [mg.Int(word) for word in carry[size:]]
        following = (step + 1).at_most(last)
        for part in range(parts):
            acc = self.start_part(step, part, a, acc)
            if not self.tiles.overlap:
                acc = mg.wgmma_finish(acc, a)
            if part == parts - 1:
                self.wait_stage(following)
                upcoming = self.decode_part(following, 0, first_block)
            else:
                upcoming = self.decode_part(step, part + 1, first_block)
            if self.tiles.overlap:
                acc = mg.wgmma_finish(acc, a)
            a = upcoming
        self.release(step)
        return acc + [word.value for word in a]

    def release(self, step: mg.Int) -> None:
        """Leave a stage. A warp in turn refills one that all have left.

        With 3 stages or more that is the stage before, so that nobody waits. With 2 it is this one:
        the next must be on its way before anyone waits for it.
        """
        stages, lag = self.tiles.stages, min(1, self.tiles.stages - 2)
        mg.sync_warp()
        with mg.when(self.lane.equals(0)):
            self.barriers.arrive(self.empty(step))
            turn = self.warp.equals(step % WARPS)
            refill = mg.both(mg.Int(lag) < step + 1, step + (stages - lag) < self.count)
            with mg.when(mg.both(turn, refill)):
                left = step - lag
                self.barriers.wait(self.empty(left), left // stages & 1)
                self.copy_stage(left + stages)

    def empty(self, step: mg.Int) -> mg.Int:
        """The barrier on which the warps leave a stage."""
        return step % self.tiles.stages + (self.tiles.stages + 1)

    def run_window(self, window: mg.Int, windows: mg.Int, acc: list) -> list:
        self.barriers.wait(self.scale_barrier, window & 1)
        mg.sync_block()  # all have left the scales of the window before
        self.decode_scales(window)
        mg.sync_block()
        with mg.when(window + 1 < windows):
            self.copy_scales(window + 1)
        first = window * self.layout.window
        stages = (self.count - first).at_most(self.layout.window)
        first_block, last = self.window_reader(window).first, first + stages - 1
        self.wait_stage(first)
        a = [word.value for word in self.decode_part(first, 0, first_block)]

        def body(i: mg.Int, carry: list) -> list:
            return self.run_stage(first + i, last, first_block, carry)

        return mg.loop(stages, acc + a, body)[: len(acc)]

    # The result

    def write(self, acc: list) -> None:
        """Sum the two halves of k through shared memory and store, some columns at a time."""
        width = self.layout.out_columns
        for first in range(0, self.layout.columns, width):
            mg.sync_block()
            base = self.x_ring + self.half * (4 * width * OUT_PITCH)
            base = base + (self.quad * (2 * OUT_PITCH) + self.warp_row + self.group << 2)
            for column in range(first, min(first + width, self.layout.columns), 8):
                for r in range(4):
                    place = (column - first + r % 2) * OUT_PITCH + 8 * (r // 2)
                    mg.store(base + 4 * place, acc[column // 2 + r])
            mg.sync_block()
            self.store_columns(first, min(width, self.problem.m - first))

    def store_columns(self, first: int, count: int) -> None:
        dtype = self.problem.dtype if self.tiles.slabs == 1 else jnp.float32
        tile_row = self.thread & (ROWS - 1)
        row = self.first_row + tile_row
        for start in range(0, count, THREADS // ROWS):
            column = (self.thread >> 7) + start
            with mg.when(mg.both(row < self.problem.n, column < count)):
                address = self.x_ring + (column * OUT_PITCH + tile_row << 2)
                other = address + 4 * self.layout.out_columns * OUT_PITCH
                value = mg.add(mg.load_float(address), mg.load_float(other))
                place = ((column + first) * self.problem.n + row).wide()
                target = self.out + place * jnp.dtype(dtype).itemsize
                mg.store(target, mg.round_to(value, dtype))

    def run(self) -> None:
        windows = (self.count + (self.layout.window - 1)) // self.layout.window
        code = mg.load_code(self.codebook)
        scale_table = self.reader.load_table() if self.problem.double else []
        with mg.when(self.thread.equals(0)):
            arrivals = [ROWS + self.problem.double] + [WARPS] * self.tiles.stages
            self.barriers.initialize(2, arrivals)
        mg.sync_block()
        self.copy_scales(mg.Int(0))  # before the stages, which would keep them waiting
        with mg.when(self.thread.equals(0)):
            for i in range(self.tiles.stages):
                with mg.when(mg.Int(i) < self.count):
                    self.copy_stage(mg.Int(i))
        mg.build_pair_table(self.table, code, self.problem.dtype, WARPS)
        if self.problem.double:
            with mg.when(self.warp.equals(0)):
                self.reader.store_table(self.scale_table, scale_table)
        acc = [mg.zero()] * (self.layout.columns // 2)
        acc = mg.loop(windows, acc, lambda i, acc: self.run_window(i, windows, acc))
        self.write(acc)


def arrange(x: jax.Array) -> jax.Array:
    """Reorder x [M, K] for wgmma: int32 [K' / 8, M', 4] with M' and K' rounded up to 8 and 256.

    Within each 32 k, word 4q + j (k = 8q + 2j) of a row goes to block j, place q: lane q of a quad
    decodes the 8 k of one packed word, and block j is what its j-th pair of codes meets.
    """
    m, k = x.shape
    words = jax.lax.bitcast_convert_type(x.reshape(m, k // 2, 2), jnp.int32)
    words = jnp.pad(words, ((0, -m % 8), (0, -k % STAGE // 2)))
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
            _Block(context, problem, tiles, layout, refs, out, scratch).run()

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
