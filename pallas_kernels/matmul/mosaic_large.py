"""Hopper matmul for many rows of x: decoded into registers, never in memory.

A block computes tiles of the transposed result, y.T = W @ x.T, 128 outputs by up to 256 rows of x,
in steps of 64 along the contraction, with three warpgroups around a ring of shared-memory slots:

    one copier       starts the copies of packed bytes and of x into a free slot, and puts the
                     step's scales beside them
    two multipliers  64 outputs each: decode a step into the registers of wgmma's left operand while
                     the tensor cores multiply the step before

Codes and scales are rounded to x's dtype and multiplied there. The product with the weight
contracted along N (dX = dY @ W) differs only in how a lane gathers its part of the packed bytes:
`mosaic_left`.

The two blocks of a cluster have the same rows of x, and each copies half of these for both: the L2
cache has not the bandwidth for a copy each. `large_layout` divides the work, also inside tiles,
whose sums `mosaic_exchange` or `mosaic_sums` brings together.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels import mosaic_table as pair_table
from pallas_kernels.matmul.config_large import (
    LargeTiles,
    decoded_time,
    large_candidates,
    large_time,
)
from pallas_kernels.matmul.large_layout import CLUSTER, MULTIPLIERS, MULTIPLYING, Layout, Share
from pallas_kernels.matmul.mosaic_codes import Codes
from pallas_kernels.matmul.mosaic_copier import Copier, copy_table
from pallas_kernels.matmul.mosaic_exchange import Exchange
from pallas_kernels.matmul.mosaic_exchange import shapes as exchange_shapes
from pallas_kernels.matmul.mosaic_left import LINE, Lane
from pallas_kernels.matmul.mosaic_ring import Ring
from pallas_kernels.matmul.mosaic_sums import Sums
from pallas_kernels.matmul.mosaic_sums import shapes as sums_shapes
from pallas_kernels.matmul.problem import Operands, Problem, describe

LAUNCH_REGISTERS = 168  # a thread's share when 384 threads start
MULTIPLIER_REGISTERS, COPIER_REGISTERS = 232, 40
MULTIPLIERS_BARRIER = MULTIPLIERS + 1  # the warpgroups have those before


def matmul(x, packed, scales, codebook, *, block_size, transpose=False, layer=None, config=None):
    """See `pallas_kernels.matmul`. `config` are `LargeTiles`; None estimates the best."""
    problem, operands = prepare(x, packed, scales, codebook, block_size, layer)
    sms = mg.multiprocessors()
    tiles = config or candidates(problem.m, problem.n, problem.k, transpose)[0]
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


def candidates(m: int, n: int, k: int, transpose: bool) -> list[LargeTiles]:
    """Tiles for the device that the current trace is for, the least estimated time first."""
    outputs, contracted = (k, n) if transpose else (n, k)
    return large_candidates(m, outputs, contracted, transpose, mg.multiprocessors())


def slower(x, packed, scales, codebook, *, block_size, transpose=False, layer=None) -> str | None:
    """Why decoding to memory and an ordinary dot is estimated to be faster, or None."""
    m, n, k = x.shape[0], packed.shape[-2], 2 * packed.shape[-1]
    tiles = candidates(m, n, k, transpose)[0]
    outputs, contracted = (k, n) if transpose else (n, k)
    here = large_time(tiles, m, outputs, contracted, transpose, mg.multiprocessors())
    there = decoded_time(m, n, k)
    if here <= there:
        return None
    return f"about {here:.0f} us for {m} rows, against {there:.0f} us with the weight decoded first"


class _Block:
    """One thread's view of the kernel."""

    def __init__(self, context, layout: Layout, refs: Operands, out, sums, flags, scratch):
        self.layout, self.problem = layout, layout.problem
        self.tiles, self.left = layout.tiles, layout.left
        self.context, self.refs, self.scratch = context, refs, scratch
        self.thread, self.share = mg.thread_index(), Share(layout)
        self.ring = Ring(scratch["barriers"], self.tiles.slots)
        self.out = mem.global_address(out)
        self.x, self.packed, self.scales, self.pairs, self.table = (
            mem.shared_address(scratch[name])
            for name in ("x", "packed", "scales", "pairs", "table")
        )
        self.shared = sums, flags
        self.sums = None
        if layout.uneven:
            self.sums = Sums(layout, self.share, self.ring, self.x, sums, flags)

    # Roles

    def run(self) -> None:
        self.setup()

        def start(registers: int, body) -> None:
            mg.set_registers(registers, LAUNCH_REGISTERS)
            body()

        (multiplies, *multiply), (_, *copy) = self.roles()
        mg.branch(multiplies, lambda: start(*multiply), lambda: start(*copy))
        mg.sync_cluster()  # the other block may still reach into this one

    def setup(self) -> None:
        self.code = pair_table.load_code(mem.global_address(self.refs.codebook))
        with mg.when(self.thread.equals(0)):
            self.ring.initialize()
        if self.problem.double:
            copy_table(self.layout, self.refs, self.table)
        mg.sync_block()
        mg.sync_cluster()

    def roles(self) -> list[tuple]:
        """Which threads, their registers and what they do; side by side."""
        multiplies = self.thread < MULTIPLYING
        copies = mg.Int(MULTIPLYING - 1) < self.thread
        return [
            (multiplies, MULTIPLIER_REGISTERS, self.multiply),
            (copies, COPIER_REGISTERS, self.copy),
        ]

    def copy(self) -> None:
        copier = Copier(self.context, self.layout, self.share, self.ring, self.refs, self.scratch)
        copier.run()
        if self.sums:
            self.sums.copy()

    # Multiplying

    def multiply(self) -> None:
        share, sums = self.share, self.sums
        self.at = Lane(self.thread)
        self.codes = Codes(self.pairs, self.code, self.problem.dtype, MULTIPLYING // mg.WARP)
        mg.sync_threads(mg.Int(MULTIPLIERS_BARRIER), MULTIPLYING)

        def segment(i: mg.Int, a: list) -> list:
            part = share.segment(i)
            acc, a = self.product(part.step, part.units, a)
            if self.layout.shares > 1:
                exchange = Exchange(self.layout, share, self.at, *self.shared)
                self.write(exchange.part(acc), part.tile, exchange.first_row)
            elif sums is None:
                self.write(acc, part.tile)
            else:
                tails = mg.select(part.ends, mg.Int(0), share.tails())
                acc = mg.loop(tails, acc, lambda j, acc: sums.add(acc, j))
                mg.branch(
                    part.begins,
                    lambda: self.write(acc, part.tile),
                    lambda: sums.write(acc, self.at.warpgroup),
                )
            return a

        mg.loop(share.segments(), [word.value for word in self.operand(mg.Int(0))], segment)

    def operand(self, p: mg.Int) -> list[mg.Int]:
        """Wait for a step, and decode it."""
        self.ring.wait_full(p)
        slot, left = p % self.tiles.slots, self.left
        packed = self.packed + slot * (left.box[0] * left.box[1])
        scales = self.scales + slot * (4 * left.scale_words)
        return left.words(self.at, packed, scales, self.codes)

    def start(self, p: mg.Int, a: list[mg.Int], acc: list) -> list:
        """Start the product with a step of x."""
        x = self.x + p % self.tiles.slots * self.layout.x_bytes
        return mg.wgmma_start(acc, a, mg.swizzled_descriptor(x), 32 >> 4, self.problem.dtype)

    def product(self, p0: mg.Int, units: mg.Int, a: list) -> tuple[list, list]:
        """The sum of some units, from step p0, whose operand is `a`; the next step's operand."""
        size, last = self.tiles.rows // 2, self.share.steps - 1

        def unit(i: mg.Int, carry: list) -> list:
            acc, a = carry[:size], [mg.Int(word) for word in carry[size:]]
            p = p0 + (i << 1)
            acc = self.start(p, a, acc)
            b = self.operand(p + 1)
            acc = self.start(p + 1, b, acc)
            mg.wgmma_wait(1, a)
            self.ring.release(p)
            a = self.operand((p + 2).at_most(last))  # the last is decoded again, to no effect
            acc = mg.wgmma_finish(acc, b)
            self.ring.release(p + 1)
            return acc + [word.value for word in a]

        carry = mg.loop(units, [mg.zero()] * size + a, unit)
        return carry[:size], carry[size:]

    def write(self, acc: list, tile: mg.Int, first_row: mg.Int | int = 0) -> None:
        """Store a tile, or its rows of x from one on, through the gaps of the pair table."""
        output0, row0 = self.share.origin(tile)
        row0 = row0 + first_row
        at, outputs = self.at, self.left.outputs
        thread = self.thread & (mg.WARPGROUP - 1)
        chunk = thread & 7
        staging = self.pairs + pair_table.PITCH + at.warpgroup * (64 * LINE)
        column = output0 + (at.warpgroup << 6) + (chunk << 3)
        for first in range(0, 2 * len(acc), 64):
            some = acc[first // 2 :][:32]
            mg.sync_threads(at.warpgroup + 1, mg.WARPGROUP)
            self.left.stage(at, some, staging)
            mg.sync_threads(at.warpgroup + 1, mg.WARPGROUP)
            for start in range(0, 2 * len(some), 16):
                line = (thread >> 3) + start
                words = mem.load_words(staging + line * LINE + ((chunk ^ (line & 7)) << 4))
                line = row0 + first + line
                with mg.when(mg.both(line < self.problem.m, column < outputs)):
                    place = line.wide() * outputs + column.wide()
                    mem.store_words(self.out + (place << 1), words)


@functools.cache
def build(problem: Problem, tiles: LargeTiles, transpose: bool, sms: int):
    """The kernel of a problem: a function of its `Operands` giving y [M, outputs]."""
    layout = Layout(problem, tiles, transpose, sms)
    out_types = [jax.ShapeDtypeStruct((problem.m, layout.left.outputs), problem.dtype)]
    if layout.uneven or layout.shares > 1:
        shapes = (sums_shapes if layout.uneven else exchange_shapes)(layout)
        out_types += map(jax.ShapeDtypeStruct, shapes, (jnp.float32, jnp.int32))

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
    return lambda operands: kernel(*operands[:5])[0]  # it adds nothing
