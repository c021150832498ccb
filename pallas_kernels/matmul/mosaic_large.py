"""Hopper matmul for many rows of x: decoded into registers, never in memory.

A block computes tiles of the transposed result, y.T = W @ x.T, 128 outputs by up to 256 rows of x,
in steps of 64 along the contraction, with three warpgroups around a ring of shared-memory slots:

    one copier       starts the copies of packed bytes and of x into a free slot, and puts the
                     step's scales beside them
    two multipliers  64 outputs each: decode a step into the registers of wgmma's left operand while
                     the tensor cores multiply the step before

Codes come from registers too, by byte permutations. Codes and scales are rounded to x's dtype and
multiplied there. The product with the weight contracted along N (dX = dY @ W) differs only in how a
lane gathers its part of the packed bytes: `mosaic_left`.

Two blocks make a cluster: they have neighbouring outputs and the same rows of x, and each copies
half of these for both; the L2 cache has not the bandwidth for a copy each.

Clusters share the work evenly, to two steps: a share may start or end inside a tile. The one with
the start of a tile adds the sums of the others, in order, through device memory. It waits only for
clusters of lower numbers, which the GPU starts earlier.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels import mosaic_table as pair_table
from pallas_kernels.matmul.config_large import LargeTiles, choose_large, decoded_time, large_time
from pallas_kernels.matmul.mosaic_left import LINE, OUTPUTS, STEP, TABLE, Columns, Lane, Rows
from pallas_kernels.matmul.problem import Operands, Problem, describe

CLUSTER = 2  # blocks
MULTIPLIERS = 2  # warpgroups
MULTIPLYING = MULTIPLIERS * mg.WARPGROUP  # threads
COPY_GROUP = 4  # steps whose scales are loaded together
LAUNCH_REGISTERS = 168  # a thread's share when 384 threads start
MULTIPLIER_REGISTERS, COPIER_REGISTERS = 232, 40
PARTS = 4  # of a sum, each as large as a slot's part of x
ROW_GROUP = 8  # tiles of rows that take their turn at a tile of outputs together


def matmul(x, packed, scales, codebook, *, block_size, transpose=False, layer=None, config=None):
    """See `pallas_kernels.matmul`. `config` are `LargeTiles`; None estimates the best."""
    problem, operands = prepare(x, packed, scales, codebook, block_size, layer)
    sms = mg.multiprocessors()
    sides = problem.n, problem.k
    outputs, contracted = reversed(sides) if transpose else sides
    tiles = config or choose_large(problem.m, outputs, contracted, sms)
    return build(problem, tiles, transpose, sms)(operands)


def prepare(x, packed, scales, codebook, block_size, layer) -> tuple[Problem, Operands]:
    """The static part of a call and its arrays, in either direction."""
    rows = jax.ShapeDtypeStruct((x.shape[0], 2 * packed.shape[-1]), x.dtype)  # as if along K
    problem, operands = describe(rows, packed, scales, codebook, block_size, layer)
    return problem, operands._replace(x=x)


def unsupported(
    x, packed, scales, codebook, *, block_size, transpose=False, layer=None
) -> str | None:
    """Why these arguments cannot run, or None."""
    n = packed.shape[-2]
    if not x.shape[0]:
        return "x has no rows"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype}; the kernel multiplies bfloat16 and float16"
    if block_size < 32 or block_size & (block_size - 1):
        return f"block_size is {block_size}; the kernel needs a power of two from 32"
    if n % 8:
        return f"N is {n}; the kernel needs a multiple of 8"
    return None


def slower(x, packed, scales, codebook, *, block_size, transpose=False, layer=None) -> str | None:
    """Why decoding to memory and an ordinary dot is estimated to be faster, or None."""
    m, n, k = x.shape[0], packed.shape[-2], 2 * packed.shape[-1]
    outputs, contracted = (k, n) if transpose else (n, k)
    sms = mg.multiprocessors()
    here = large_time(choose_large(m, outputs, contracted, sms), m, outputs, contracted, sms)
    there = decoded_time(m, n, k)
    if here <= there:
        return None
    return f"about {here:.0f} us for {m} rows, against {there:.0f} us with the weight decoded first"


class Layout:
    """Sizes that follow from the problem and the tiles; the work and its division."""

    def __init__(self, problem: Problem, tiles: LargeTiles, transpose: bool, sms: int):
        self.problem, self.tiles = problem, tiles
        self.left = (Columns if transpose else Rows)(problem)
        self.row_tiles = pl.cdiv(problem.m, tiles.rows)
        self.row_group = max(d for d in range(1, ROW_GROUP + 1) if self.row_tiles % d == 0)
        self.output_tiles = pl.cdiv(self.left.outputs, CLUSTER * OUTPUTS)  # of a cluster
        self.units = pl.cdiv(self.left.contracted, 2 * STEP)  # of a tile: two steps each
        tiles_total = self.output_tiles * self.row_tiles
        # Shares are counted in grains: units, or whole tiles.
        self.grain = 1 if tiles.split else self.units
        self.grains = tiles_total * (self.units // self.grain)
        self.clusters = min(sms // CLUSTER, self.grains, tiles_total * max(tiles.split, 1))
        self.shares, rest = divmod(self.clusters, tiles_total)  # of a tile, where none has two
        if rest or self.shares < 2:
            self.shares = 1
        self.head = (self.units + (self.shares - 1) * tiles.lead) // self.shares
        self.splits = any(self.begin(c) % self.units for c in range(self.clusters))

    def begin(self, cluster):
        """The first unit of a cluster's share (of the end, for the number of clusters)."""
        if self.shares == 1:
            return cluster * self.grains // self.clusters * self.grain
        tile, share = cluster // self.shares, cluster % self.shares
        later = (share + (self.shares - 1)) // self.shares  # 0 for the head, 1 for the others
        others = (share - later) * (self.units - self.head) // (self.shares - 1)
        return tile * self.units + later * self.head + others

    def last_cluster(self, tile):
        """The cluster whose share has the last unit of a tile."""
        if self.shares > 1:
            return (tile + 1) * self.shares - 1
        return (((tile + 1) * self.units // self.grain) * self.clusters - 1) // self.grains

    def tile(self, tile):
        """The tile's place among a cluster's outputs and among rows of x."""
        span = self.row_group * self.output_tiles
        group, within = tile // span, tile % span
        return within // self.row_group, group * self.row_group + within % self.row_group

    def scratch(self, _=None) -> dict:
        """Shared memory of a block, by name."""
        slots, dtype = self.tiles.slots, jnp.dtype(self.problem.dtype)
        return {
            "x": plgpu.SMEM((slots, self.tiles.rows, STEP), dtype),
            "packed": plgpu.SMEM((slots, *self.left.box), jnp.uint8),
            "scales": plgpu.SMEM((slots * self.left.scale_words,), jnp.int32),
            "pairs": plgpu.SMEM((2 * pair_table.WORDS,), jnp.int32),
            "table": plgpu.SMEM((TABLE,), jnp.float32),
            "barriers": plgpu.SMEM((4 * slots,), jnp.int32),
        }


class _Block:
    """One thread's view of the kernel."""

    def __init__(self, context, layout: Layout, refs: Operands, out, sums, flags, scratch):
        self.context, self.layout, self.refs = context, layout, refs
        self.problem, self.tiles, self.left = layout.problem, layout.tiles, layout.left
        self.thread = mg.thread_index()
        self.rank = mg.cluster_rank()
        # Later numbers are for earlier work: the head of a tile waits for the clusters of its tail.
        self.cluster = mg.Int(layout.clusters - 1) - mg.block_index() // CLUSTER
        self.first, self.end = layout.begin(self.cluster), layout.begin(self.cluster + 1)
        self.out = mem.global_address(out)
        if layout.splits:
            self.sums, self.flags = mem.global_address(sums), mem.global_address(flags)
            self.tag = mem.grid_tag()
        self.scratch = scratch
        self.x, self.packed, self.scales, self.pairs, self.table = (
            mem.shared_address(scratch[name])
            for name in ("x", "packed", "scales", "pairs", "table")
        )
        slots = self.tiles.slots
        self.barriers = mem.Barriers(scratch["barriers"], 2 * slots)

    # Slots: step p of a block's share; the first barriers are for full slots, the others for free.

    def wait_full(self, p: mg.Int) -> None:
        slots = self.tiles.slots
        self.barriers.wait(p % slots, p // slots & 1)

    def wait_free(self, p: mg.Int) -> None:
        slots = self.tiles.slots
        self.barriers.wait(p % slots + slots, p // slots + 1 & 1)

    def release(self, p: mg.Int) -> None:
        """By a warp: leave a slot, in both blocks: each fills part of the other's."""
        lane = self.thread & 31
        with mg.when(lane < CLUSTER):
            self.barriers.arrive_at(p % self.tiles.slots + self.tiles.slots, lane)

    # Copying

    def place(self, p: mg.Int) -> tuple[mg.Int, mg.Int, mg.Int]:
        """First output, first row of x and step of a block's step p."""
        place = (self.first << 1) + p
        steps = 2 * self.layout.units
        return *self.origin(place // steps), place % steps

    def origin(self, tile: mg.Int) -> tuple[mg.Int, mg.Int]:
        """This block's first output and first row of x of a tile."""
        output, row = self.layout.tile(tile)
        return (output * CLUSTER + self.rank) * OUTPUTS, row * self.tiles.rows

    def copy(self) -> None:
        thread, count = self.thread - MULTIPLYING, self.end - self.first << 1
        layer = mg.Int(0)
        if self.problem.stacked:
            layer = mem.load_word(mem.global_address(self.refs.layer))
        bases = [mem.global_address(ref) for ref in self.refs.scales]
        offset = None
        if self.problem.double:
            offset = mem.load_float(bases[2] + (layer << 2).wide())

        def copy_tiles(p: mg.Int) -> None:
            with mg.when(thread.equals(0)):
                self.copy_tiles(p, layer)

        def load(p: mg.Int) -> list:
            output0, _, step = self.place(p.at_most(count - 1))
            return self.left.load_scales(bases, layer, thread, output0, step)

        def load_group(first: mg.Int) -> list:
            return [value for i in range(COPY_GROUP) for value in load(first + i)]

        def fill(p: mg.Int, raw: list) -> None:
            slot = p % self.tiles.slots
            with mg.when(mg.Int(self.tiles.slots - 1) < p):
                self.wait_free(p)
                copy_tiles(p)
            output0, _, step = self.place(p)
            target = self.scales + slot * (4 * self.left.scale_words)
            values = self.left.decode_scales(raw, self.table, offset)
            places = self.left.scales(thread, output0, step)
            for (_, _, place), value in zip(places, values, strict=True):
                self.left.store_scale(target + place, value)
            mg.sync_warp()
            with mg.when((thread & 31).equals(0)):
                self.barriers.arrive(slot)

        def fill_group(i: mg.Int, raw: list) -> list:
            # Loaded a group ahead: no step waits for device memory.
            first = i * COPY_GROUP
            upcoming, each = load_group(first + COPY_GROUP), len(raw) // COPY_GROUP
            for j in range(COPY_GROUP):
                with mg.when(first + j < count):
                    fill(first + j, raw[j * each : (j + 1) * each])
            return upcoming

        mg.loop(count.at_most(self.tiles.slots), [], lambda p, _: copy_tiles(p) or [])
        groups = (count + (COPY_GROUP - 1)) // COPY_GROUP
        mg.loop(groups, load_group(mg.Int(0)), fill_group)
        if self.layout.splits:
            mg.loop(self.others() * PARTS, [], lambda i, _: self.copy_sum(count, i) or [])

    def copy_tiles(self, p: mg.Int, layer: mg.Int) -> None:
        """By one thread: start the copies of a step."""
        output0, row0, step = self.place(p)
        slot = p % self.tiles.slots
        start, barrier = [row0, step * STEP], self.barriers.reference(slot)
        target, shape = mem.element(self.scratch["x"], slot), (self.tiles.rows, STEP)
        mem.copy_tensor(self.context, self.refs.x, target, start, shape, barrier, 128, shared=True)
        start = [layer] if self.problem.stacked else []
        start += self.left.origin(output0, step)
        target, shape = mem.element(self.scratch["packed"], slot), self.left.box
        swizzle = self.left.swizzle
        mem.copy_tensor(self.context, self.refs.packed, target, start, shape, barrier, swizzle)

    def others(self) -> mg.Int:
        """How many later clusters have parts of the last tile, if this one has its first."""
        units = self.layout.units
        tile = (self.end - 1) // units
        begins, ends = self.first < tile * units + 1, (tile + 1) * units < self.end + 1
        count = self.layout.last_cluster(tile) - self.cluster
        return mg.select(begins, mg.select(ends, mg.Int(0), count), 0)

    def copy_sum(self, steps: mg.Int, i: mg.Int) -> None:
        """Bring a part of another cluster's sum in a slot's x, as if it were a step."""
        slot, size = (steps + i) % self.tiles.slots, self.tiles.rows * 2 * STEP
        self.wait_free(steps + i)
        with mg.when((self.thread & (mg.WARPGROUP - 1)).equals(0)):
            part = i % PARTS
            source, flags = self.sum_of(self.cluster + 1 + i // PARTS)
            with mg.when(part.equals(0)):
                for warpgroup in range(MULTIPLIERS):
                    mem.await_signal(flags + 8 * warpgroup, self.tag)
                mem.fence_proxy()
            self.barriers.arrive(slot)
            self.barriers.expect(slot, mg.Int(size))
            barrier = self.barriers.address(slot)
            source = source + (part * size).wide()
            mem.copy_bulk(self.x + slot * size, source, mg.Int(size), barrier)
        mg.sync_warp()
        with mg.when((self.thread & 31).equals(0)):
            self.barriers.arrive(slot)

    # Multiplying

    def multiply(self) -> None:
        units = self.layout.units
        self.at = Lane(self.thread)
        warps = MULTIPLYING // mg.WARP
        pair_table.build(self.pairs, self.code, self.problem.dtype, warps, pair_table.WIDE)
        mg.sync_threads(mg.Int(MULTIPLIERS + 1), MULTIPLYING)
        first_tile = self.first // units
        count = (self.end - 1) // units - first_tile + 1

        def segment(i: mg.Int, a: list) -> list:
            tile = first_tile + i
            head, tail = tile * units, (tile + 1) * units
            begins, ends = self.first < head + 1, tail < self.end + 1
            start = mg.select(begins, head, self.first)
            stop = tail.at_most(self.end)
            acc, a = self.product(start - self.first << 1, stop - start, a)
            if not self.layout.splits:
                self.write(acc, tile)
                return a
            others = mg.select(ends, mg.Int(0), self.others())
            count = self.end - self.first << 1
            acc = mg.loop(others, acc, lambda j, acc: self.add_sum(acc, count + j * PARTS))
            mg.branch(begins, lambda: self.write(acc, tile), lambda: self.write_sum(acc))
            return a

        with mg.when(self.at.warpgroup.equals(1)):
            self.sync_start()
        mg.loop(count, [word.value for word in self.operand(mg.Int(0))], segment)

    def sync_start(self) -> None:
        """Let the first warpgroup lead by two steps: one stores a tile while the other works."""
        mg.sync_threads(mg.Int(MULTIPLIERS + 1), MULTIPLYING)

    def operand(self, p: mg.Int) -> list[mg.Int]:
        """Wait for a step, and decode it."""
        self.wait_full(p)
        slot, left = p % self.tiles.slots, self.left
        packed = self.packed + slot * (left.box[0] * left.box[1])
        scales = self.scales + slot * (4 * left.scale_words)
        return left.words(self.at, packed, scales, self.pairs)

    def start(self, p: mg.Int, a: list[mg.Int], acc: list) -> list:
        """Start the product with a step of x."""
        x = self.x + p % self.tiles.slots * (self.tiles.rows * 2 * STEP)
        return mg.wgmma_start(acc, a, mg.swizzled_descriptor(x), 32 >> 4, self.problem.dtype)

    def product(self, p0: mg.Int, units: mg.Int, a: list) -> tuple[list, list]:
        """The sum of some units, from step p0, whose operand is `a`; the next step's operand."""
        size = self.tiles.rows // 2
        last = (self.end - self.first << 1) - 1

        def unit(i: mg.Int, carry: list) -> list:
            acc, a = carry[:size], [mg.Int(word) for word in carry[size:]]
            p = p0 + (i << 1)
            acc = self.start(p, a, acc)
            b = self.operand(p + 1)
            acc = self.start(p + 1, b, acc)
            mg.wgmma_wait(1, a)
            self.release(p)
            a = self.operand((p + 2).at_most(last))  # the last is decoded again, to no effect
            acc = mg.wgmma_finish(acc, b)
            self.release(p + 1)
            with mg.when(mg.both(p.equals(0), self.at.warpgroup.equals(0))):
                self.sync_start()
            return acc + [word.value for word in a]

        carry = mg.loop(units, [mg.zero()] * size + a, unit)
        return carry[:size], carry[size:]

    # Results

    def write(self, acc: list, tile: mg.Int) -> None:
        """Store a tile, 64 rows of x at a time, through shared memory."""
        output0, row0 = self.origin(tile)
        at, outputs = self.at, self.left.outputs
        thread = self.thread & (mg.WARPGROUP - 1)
        chunk = thread & 7
        staging = self.pairs + at.warpgroup * (64 * LINE) + pair_table.PITCH
        column = output0 + (at.warpgroup << 6) + (chunk << 3)
        for first in range(0, self.tiles.rows, 64):
            self.sync_warpgroup()
            self.left.stage(at, acc, staging, first)
            self.sync_warpgroup()
            for start in range(0, 64, 16):
                line = (thread >> 3) + start
                words = mem.load_words(staging + line * LINE + ((chunk ^ (line & 7)) << 4))
                line = row0 + first + line
                with mg.when(mg.both(line < self.problem.m, column < outputs)):
                    place = line.wide() * outputs + column.wide()
                    mem.store_words(self.out + (place << 1), words)

    def sum_of(self, cluster: mg.Int) -> tuple[mg.Int, mg.Int]:
        """Where the other blocks of this rank find a cluster's sum, and its flags."""
        block = cluster * CLUSTER + self.rank
        size = self.tiles.rows * 2 * STEP * PARTS
        return self.sums + block.wide() * size, self.flags + (block * (8 * MULTIPLIERS)).wide()

    def write_sum(self, acc: list) -> None:
        """Leave the sum of a tile's tail to the cluster that has its head."""
        target, flags = self.sum_of(self.cluster)
        target = target + (self.thread << 4).wide()
        for i in range(0, len(acc), 4):
            mem.store_floats(target + 4 * MULTIPLYING * i, acc[i : i + 4])
        self.sync_warpgroup()
        with mg.when((self.thread & (mg.WARPGROUP - 1)).equals(0)):
            mem.signal(flags + (self.at.warpgroup << 3).wide(), self.tag)

    def add_sum(self, acc: list, p: mg.Int) -> list:
        """Add what another cluster has left, as it comes in the slots from step p on."""
        out, each = [], len(acc) // PARTS
        for part in range(PARTS):
            self.wait_full(p + part)
            slot = (p + part) % self.tiles.slots
            source = self.x + slot * (self.tiles.rows * 2 * STEP) + (self.thread << 4)
            mine = acc[part * each : (part + 1) * each]
            for i in range(0, each, 4):
                out += mem.add_floats(mine[i : i + 4], source + 4 * MULTIPLYING * i)
            self.release(p + part)
        return out

    def sync_warpgroup(self) -> None:
        mg.sync_threads(self.at.warpgroup + 1, mg.WARPGROUP)

    # Roles

    def setup(self) -> None:
        slots = self.tiles.slots
        self.code = pair_table.load_code(mem.global_address(self.refs.codebook))
        with mg.when(self.thread.equals(0)):
            # The copier's warps arrive and each copy; the multipliers' warps of both blocks.
            self.barriers.initialize(4 + 2, [CLUSTER * MULTIPLYING // mg.WARP] * slots)
        if self.problem.double:
            self.copy_table()
        mg.sync_block()
        mg.sync_cluster()

    def copy_table(self) -> None:
        source = mem.global_address(self.refs.scales[3])
        if self.problem.stacked_table:
            layer = mem.load_word(mem.global_address(self.refs.layer))
            source = source + layer.wide() * (4 * TABLE)
        with mg.when(self.thread < TABLE):
            place = self.thread << 2
            mem.store(self.table + place, mem.load_float(source + place.wide()))

    def roles(self) -> list[tuple]:
        """Which threads, their registers and what they do; side by side."""
        multiplies = self.thread < MULTIPLYING
        copies = mg.Int(MULTIPLYING - 1) < self.thread
        return [
            (multiplies, MULTIPLIER_REGISTERS, self.multiply),
            (copies, COPIER_REGISTERS, self.copy),
        ]

    def run(self) -> None:
        self.setup()

        def start(registers: int, body) -> None:
            mg.set_registers(registers, LAUNCH_REGISTERS)
            body()

        (multiplies, *multiply), (_, *copy) = self.roles()
        mg.branch(multiplies, lambda: start(*multiply), lambda: start(*copy))
        mg.sync_cluster()  # the other block may still reach into this one


@functools.cache
def build(problem: Problem, tiles: LargeTiles, transpose: bool, sms: int):
    """The kernel of a problem: a function of its `Operands` giving y [M, outputs]."""
    layout = Layout(problem, tiles, transpose, sms)
    out_types = [jax.ShapeDtypeStruct((problem.m, layout.left.outputs), problem.dtype)]
    if layout.splits:
        sums = (layout.clusters, CLUSTER, tiles.rows // 2, MULTIPLYING)
        flags = (layout.clusters, CLUSTER, MULTIPLIERS, 2)  # 64 bits each
        out_types += [jax.ShapeDtypeStruct(sums, jnp.float32), jax.ShapeDtypeStruct(flags, jnp.int32)]

    def qjax_matmul_large(x, packed, scales, codebook, layer, out, *rest):
        *shared, scratch = rest
        refs = Operands(x, packed, scales, codebook, layer)
        arguments = (refs, out, tuple(shared), scratch)
        types = jax.tree.map(lambda _: plgpu.RefType(), arguments)

        @plgpu.inline_mgpu(arg_types=types)
        def body(context, refs, out, shared, scratch):
            _Block(context, layout, refs, out, *(shared or (None, None)), scratch).run()

        body(*arguments)

    kernel = plgpu.kernel(
        qjax_matmul_large,
        out_type=out_types,
        grid=(layout.clusters,),
        grid_names=("cluster",),
        cluster=(CLUSTER,),
        cluster_names=("block",),
        num_threads=MULTIPLIERS + 1,
        thread_name="warpgroup",
        scratch_types=[layout.scratch()],
        compiler_params=mg.COMPILER_PARAMS,
    )
    return lambda operands: kernel(*operands)[0]
