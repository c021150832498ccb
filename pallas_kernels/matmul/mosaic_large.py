"""Hopper matmul for many rows of x: decoded in shared memory, never in device memory.

A block computes a tile of the transposed result, y.T = W @ x.T, in steps of 64 along the
contraction, with warpgroups of two kinds around a ring of shared-memory slots:

    decoders   wait for a free slot, start the copy of x into it, turn packed bytes into a bf16
               tile of W beside it
    multipliers   one for each 64 rows of the tile: wgmma, both operands from shared memory

The tensor cores run at the rate of shared memory here, so decoding uses none but to read the packed
words and write the tile: codes come from registers, by byte permutations. Codes and scales are
rounded to x's dtype and multiplied there.

The transposed product (dX = dY @ W) differs in which side of the packed tile is contracted: the
decoded tile is the same bytes, and wgmma reads it transposed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels.matmul.config_large import LargeTiles, choose_large, decoded_time, large_time
from pallas_kernels.matmul.problem import Problem, describe
from pallas_kernels.scales import SECOND_LEVEL_BLOCK

STEP = 64  # contracted elements of a slot: one 128-byte swizzled row of 16-bit values
CHUNK = 32  # weights of a 16-byte load of packed bytes
MIN_STEPS = 8  # prefetches reach at most so far
TABLE = 256  # second-level scale table
VECTOR = plgpu.Layout.WG_STRIDED((mg.WARPGROUP,), vec_size=1)  # one value a thread
SCALAR = plgpu.Layout.WG_SPLAT(())
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def matmul(x, packed, scales, codebook, *, block_size, transpose=False, layer=None, config=None):
    """See `pallas_kernels.matmul`. `config` are `LargeTiles`; None estimates the best."""
    n, k = packed.shape[-2], 2 * packed.shape[-1]
    outputs, contracted = (k, n) if transpose else (n, k)
    sms = mg.multiprocessors()
    m = x.shape[0]
    tiles = config or choose_large(m, outputs, contracted, sms)
    padded = max(pl.cdiv(m, 8) * 8, tiles.rows)  # a copy of x into shared memory spans whole tiles
    x = jnp.pad(x, ((0, padded - m), (0, 0))) if padded > m else x
    shape = jax.ShapeDtypeStruct((padded, k), x.dtype)
    problem, operands = describe(shape, packed, scales, codebook, block_size, layer)
    y = build(problem, tiles, transpose, sms)(operands._replace(x=x))
    return y[:m] if padded > m else y


def unsupported(
    x, packed, scales, codebook, *, block_size, transpose=False, layer=None
) -> str | None:
    """Why these arguments cannot run, or None."""
    n, k = packed.shape[-2], 2 * packed.shape[-1]
    name, contracted, other = ("N", n, k) if transpose else ("K", k, n)
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype}; the kernel multiplies bfloat16 and float16"
    if block_size < CHUNK or block_size & (block_size - 1):
        return f"block_size is {block_size}; the kernel needs a power of two from {CHUNK}"
    if contracted % STEP or contracted < MIN_STEPS * STEP:
        least = MIN_STEPS * STEP
        return f"{name} is {contracted}; the kernel needs a multiple of {STEP}, {least} at least"
    if other % 64:
        return f"{'K' if transpose else 'N'} is {other}; the kernel needs a multiple of 64"
    return None


def slower(x, packed, scales, codebook, *, block_size, transpose=False, layer=None) -> str | None:
    """Why decoding to memory and an ordinary dot is estimated to be faster, or None."""
    m, n, k = x.shape[0], packed.shape[-2], 2 * packed.shape[-1]
    outputs, contracted = (k, n) if transpose else (n, k)
    sms = mg.multiprocessors()
    tiles = choose_large(m, outputs, contracted, sms)
    here = large_time(tiles, m, outputs, contracted, sms, transpose)
    there = decoded_time(m, n, k)
    if here <= there:
        return None
    return f"about {here:.0f} us for {m} rows, against {there:.0f} us with the weight decoded first"


class Layout:
    """Sizes that follow from the problem and the tiles."""

    def __init__(self, problem: Problem, tiles: LargeTiles, transpose: bool):
        self.problem, self.tiles, self.transpose = problem, tiles, transpose
        self.outputs, self.contracted = problem.n, problem.k
        if transpose:
            self.outputs, self.contracted = self.contracted, self.outputs
        # The packed tile: weight rows by weight columns.
        self.rows, self.columns = (STEP, tiles.outputs) if transpose else (tiles.outputs, STEP)
        self.parts = mg.WARPGROUP // self.rows  # threads that share a weight row
        self.chunks = self.columns // CHUNK // self.parts  # 16-byte loads of a thread
        self.span = CHUNK * self.chunks  # columns of a thread
        self.scales = max(1, self.span // problem.block_size)  # of a thread
        self.steps = self.contracted // STEP
        self.output_tiles = pl.cdiv(self.outputs, tiles.outputs)
        self.tiles_total = self.output_tiles * pl.cdiv(problem.m, tiles.rows)
        packed_row = self.columns // 2
        self.packed_transforms = (
            plgpu.TilingTransform((8, packed_row)),
            plgpu.SwizzleTransform(packed_row),
        )
        self.multipliers = tiles.outputs // 64


def _vector(dtype):
    return plgpu.ShapeDtypeStruct((mg.WARPGROUP,), dtype, layout=VECTOR)


class Decoder:
    """A decoding warpgroup: each thread has a weight row of the tile, and a part of its columns."""

    def __init__(self, layout: Layout):
        self.layout, self.problem = layout, layout.problem

    def place(self) -> tuple[mg.Int, mg.Int]:
        """This thread's row of the packed tile and its part of the columns."""
        thread = mg.thread_index() % mg.WARPGROUP
        return thread % self.layout.rows, thread // self.layout.rows

    def code_planes(self, codebook_ref) -> tuple[jax.Array, ...]:
        """The 16 codes in x's dtype: 4 words of high bytes, 4 of low bytes."""
        dtype = self.problem.dtype

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(_vector(jnp.int32),) * 8)
        def build(_, ref):
            base = mg.global_address(ref)
            codes = mg.load_floats(base, 16)
            pairs = [mg.pack_pair(*codes[i : i + 2], dtype) for i in range(0, 16, 2)]
            planes = [
                mg.permute(*pairs[i : i + 2], mg.Int(selector))
                for selector in (0x7531, 0x6420)
                for i in range(0, 8, 2)
            ]
            return tuple(mg.to_vector(plane, VECTOR) for plane in planes)

        return build(codebook_ref)

    def load_scales(self, refs, layer, row0, column0) -> tuple[jax.Array, ...]:
        """What a thread's scales of a tile are made of: float32, or (code, float32) when double."""
        double, count = self.problem.double, self.layout.scales
        types = tuple(plgpu.RefType() for _ in refs)
        result = ([_vector(jnp.int32)] if double else []) + [_vector(jnp.float32)]

        @plgpu.inline_mgpu(
            arg_types=(types, SCALAR, SCALAR, SCALAR), return_type=tuple(result * count)
        )
        def load(_, refs, layer, row0, column0):
            problem = self.problem
            layer, row0, column0 = map(mg.from_scalar, (layer, row0, column0))
            row, part = self.place()
            row = (row + row0).at_most(problem.n - 1)
            column = (column0 + part * self.layout.span).at_most(problem.k - 1)
            block = column // problem.block_size
            bases = [mg.global_address(ref) for ref in refs]
            out = []
            for i in range(count):
                here = (block + i).at_most(problem.blocks - 1) if i else block
                flat = (layer.wide() * problem.n + row.wide()) * problem.blocks + here.wide()
                if not problem.double:
                    out.append(mg.load_float(bases[0] + (flat << 2)))
                    continue
                _, absmax, _, _, origin = bases
                position = (row + mg.load_word(origin)) * problem.pitch
                position = position + mg.load_word(origin + 4) + here
                group = layer * problem.groups + position // SECOND_LEVEL_BLOCK
                out.append(mg.load_byte(bases[0] + flat))
                out.append(mg.load_float(absmax + (group << 2).wide()))
            return tuple(mg.to_vector(value, VECTOR) for value in out)

        return load(tuple(refs), layer, row0, column0)

    def decode(self, packed_ref, w_ref, table_ref, planes, scales) -> None:
        """Write the decoded tile of a slot."""
        layout, dtype = self.layout, self.problem.dtype
        types = (
            plgpu.RefType(layout.packed_transforms),
            plgpu.RefType(SWIZZLED),
            plgpu.RefType(),
            (VECTOR,) * len(planes),
            (VECTOR,) * len(scales),
        )

        @plgpu.inline_mgpu(arg_types=types)
        def body(_, packed_ref, w_ref, table_ref, planes, scales):
            planes = [mg.from_vector(plane) for plane in planes]
            scales = [mg.from_vector(scale) for scale in scales]
            if self.problem.double:
                table = mg.shared_address(table_ref)
                offset = mg.load_float(table + 4 * TABLE)
                scales = [
                    mg.mul_then_add(mg.load_float(table + (code << 2)), absmax, offset)
                    for code, absmax in zip(scales[0::2], scales[1::2], strict=True)
                ]
            pairs = [mg.pack_pair(scale, scale, dtype) for scale in scales]
            row, part = self.place()
            source = mg.shared_address(packed_ref) + row * (layout.columns // 2)
            target = mg.shared_address(w_ref) + (row >> 3) * (16 * layout.columns)
            target = target + ((row & 7) << 7)
            # The swizzles: 16-byte chunks of a row are permuted by bits of its row number.
            per_row = layout.columns // CHUNK
            packed_twist = (row >> (2 if per_row == 2 else 1)) & (per_row - 1)
            chunks = [part * layout.chunks + i for i in range(layout.chunks)]
            # All loads come first: none may pass a store to shared memory.
            packed = [mg.load_words(source + ((chunk ^ packed_twist) << 4)) for chunk in chunks]
            for i, (chunk, words) in enumerate(zip(chunks, packed, strict=True)):
                scale = pairs[i * CHUNK * len(pairs) // layout.span]
                panel = target + ((chunk >> 1) << 10)
                for j, word in enumerate(words):
                    values = mg.decode_permuted(word, planes)
                    values = [mg.mul_pairs(value, scale, dtype) for value in values]
                    place = ((chunk & 1) * 4 + j) ^ (row & 7)
                    mg.store_words(panel + (place << 4), values)

        body(packed_ref, w_ref, table_ref, tuple(planes), tuple(scales))


def _copy_table(scales, layer, table_s, problem: Problem) -> None:
    """Copy the second-level table and the layer's offset behind it to shared memory."""
    _, _, offset, table, _ = scales

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType(), SCALAR))
    def body(_, offset, table, table_s, layer):
        layer, thread = mg.from_scalar(layer), mg.thread_index() % mg.WARPGROUP
        source, target = mg.global_address(table), mg.shared_address(table_s)
        if problem.stacked_table:
            source = source + layer.wide() * (4 * TABLE)
        for first in range(0, TABLE, mg.WARPGROUP):
            place = (thread + first) << 2
            mg.store(target + place, mg.load_float(source + place.wide()))
        offset = mg.load_float(mg.global_address(offset) + (layer << 2).wide())
        mg.store(target + 4 * TABLE, offset)

    body(offset, table, table_s, layer)
    plgpu.commit_smem()


def _store_transposed(acc, staging, first: int, problem: Problem) -> None:
    """Write 64 columns of an accumulator [64, rows], from `first`, as [64 rows of x, 64]."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(SWIZZLED)))
    def body(_, acc, ref):
        thread = mg.thread_index() % mg.WARPGROUP
        warp, lane = mg.warp_and_lane(thread)
        matrix, line = lane >> 3, lane & 7
        chunk = ((warp << 1) + (matrix & 1)) ^ line
        base = mg.shared_address(ref) + ((matrix >> 1) << 10) + (line << 7) + (chunk << 4)
        registers = acc.registers.reshape(-1, 2)
        for group in range(first // 8, first // 8 + 8, 2):
            words = [
                mg.pack_pair(*mg.split(registers[group + i, half]), problem.dtype)
                for i in range(2)
                for half in range(2)
            ]
            mg.store_matrices_transposed(base + (group - first // 8) * 1024, words)

    body(acc, staging)


@functools.cache
def build(problem: Problem, tiles: LargeTiles, transpose: bool, sms: int):
    """The kernel of a problem: a function of its `Operands` giving y [M, outputs]; M in eights."""
    layout = Layout(problem, tiles, transpose)
    decoder = Decoder(layout)
    slots, steps = tiles.slots, layout.steps
    blocks = min(sms, layout.tiles_total)

    def qjax_matmul_large(x, packed, scales, codebook, layer, out, *scratch):
        x_s, w_s, packed_s, staging, table_s, full, packed_full, free = scratch
        group, block = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("block")
        count = jax.lax.div(layout.tiles_total - 1 - block, blocks) + 1
        layer_index = layer[0]

        def tile_origin(i):
            """The first output and the first row of x of this block's i-th tile."""
            tile = block + i * blocks
            output = jax.lax.rem(tile, layout.output_tiles) * tiles.outputs
            return output, jax.lax.div(tile, layout.output_tiles) * tiles.rows

        def weight_origin(i, step):
            """The first row and column of the packed tile of a step."""
            output, _ = tile_origin(i)
            return (step * STEP, output) if transpose else (output, step * STEP)

        def decode_role(first):
            if problem.double:
                _copy_table(scales, layer_index, table_s, problem)
            planes = decoder.code_planes(codebook)
            stride = tiles.decoders

            def after(place, distance):
                """The tile and step `distance` steps on; at most `steps` of them."""
                i, step = place
                step = step + distance
                wrap = step >= steps
                return i + wrap.astype(jnp.int32), jnp.where(wrap, step - steps, step)

            def copy_packed(place, slot):
                row, column = weight_origin(*place)
                source = packed.at[layer_index] if problem.stacked else packed
                source = source.at[
                    pl.ds(row, layout.rows),
                    pl.ds(jax.lax.div(column, 2), layout.columns // 2),
                ]
                plgpu.copy_gmem_to_smem(source, packed_s.at[slot], packed_full.at[slot])

            def load_scales(place):
                i, step = place
                return decoder.load_scales(
                    scales, layer_index, *weight_origin(jnp.minimum(i, count - 1), step)
                )

            def fill(j, place, scales_here):
                """The j-th step of this warpgroup."""
                slot = jax.lax.rem(first + j * stride, slots)

                @pl.when(first + j * stride >= slots)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                i, step = place
                _, row0 = tile_origin(i)
                plgpu.copy_gmem_to_smem(
                    x.at[pl.ds(row0, tiles.rows), pl.ds(step * STEP, STEP)],
                    x_s.at[slot],
                    full.at[slot],
                )
                plgpu.barrier_wait(packed_full.at[slot])
                decoder.decode(packed_s.at[slot], w_s.at[slot], table_s, planes, scales_here)
                plgpu.commit_smem()
                plgpu.barrier_arrive(full.at[slot])
                upcoming = after(place, slots)
                pl.when(upcoming[0] < count)(lambda: copy_packed(upcoming, slot))

            def load_group(place):
                queue = []
                for _ in range(tiles.group):
                    queue.append(load_scales(place))
                    place = after(place, stride)
                return tuple(queue)

            def fill_group(group, carry):
                # The scales of the next steps are loaded at once, far from the next `commit_smem`:
                # its fence waits for every load in flight.
                place, queue = carry
                upcoming = after(place, tiles.group * stride)
                loaded = load_group(upcoming)
                for u in range(tiles.group):
                    j = group * tiles.group + u
                    pl.when(j < mine)(functools.partial(fill, j, place, queue[u]))
                    place = after(place, stride)
                return upcoming, loaded

            start = jnp.int32(0), first
            for j in range(slots // stride):
                copy_packed(after(start, j * stride), first + j * stride)
            mine = jax.lax.div(count * steps - first + stride - 1, stride)
            groups = pl.cdiv(mine, tiles.group)
            jax.lax.fori_loop(0, groups, fill_group, (start, load_group(start)))

        def multiply_role(which):
            def tile_body(i, _):
                def scope(acc):
                    def step_body(step, _):
                        slot = jax.lax.rem(i * steps + step, slots)
                        plgpu.barrier_wait(full.at[slot])
                        if transpose:
                            w = w_s.at[slot, :, pl.ds(which * 64, 64)].transpose((1, 0))
                        else:
                            w = w_s.at[slot, pl.ds(which * 64, 64)]
                        plgpu.wgmma(acc, w, x_s.at[slot].transpose((1, 0)))
                        plgpu.wgmma_wait(1)

                        @pl.when(step > 0)
                        def _():
                            plgpu.barrier_arrive(
                                free.at[jax.lax.rem(i * steps + step + slots - 1, slots)]
                            )

                    jax.lax.fori_loop(0, steps, step_body, None)
                    result = acc[...]
                    plgpu.barrier_arrive(free.at[jax.lax.rem((i + 1) * steps - 1, slots)])
                    return result

                acc = pl.run_scoped(scope, plgpu.ACC((64, tiles.rows), jnp.float32))
                output, row0 = tile_origin(i)
                for first in range(0, tiles.rows, 64):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    _store_transposed(acc, staging.at[which], first, problem)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        staging.at[which],
                        out.at[pl.ds(row0 + first, 64), pl.ds(output + which * 64, 64)],
                    )

            jax.lax.fori_loop(0, count, tile_body, None)
            plgpu.wait_smem_to_gmem(0)

        def multiply_branch():
            if tiles.registers:
                plgpu.set_max_registers(tiles.registers[0], action="increase")
            multiply_role(group)

        def decode_branch():
            if tiles.registers:
                plgpu.set_max_registers(tiles.registers[1], action="decrease")
            decode_role(group - layout.multipliers)

        # One two-way branch: ptxas ignores the register counts otherwise.
        jax.lax.cond(group < layout.multipliers, multiply_branch, decode_branch)

    dtype = jnp.dtype(problem.dtype)
    kernel = plgpu.kernel(
        qjax_matmul_large,
        out_type=jax.ShapeDtypeStruct((problem.m, layout.outputs), dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=layout.multipliers + tiles.decoders,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((slots, tiles.rows, STEP), dtype, transforms=SWIZZLED),
            plgpu.SMEM((slots, layout.rows, layout.columns), dtype, transforms=SWIZZLED),
            plgpu.SMEM(
                (slots, layout.rows, layout.columns // 2),
                jnp.uint8,
                transforms=layout.packed_transforms,
            ),
            plgpu.SMEM((layout.multipliers, 64, 64), dtype, transforms=SWIZZLED),
            plgpu.SMEM((TABLE + 1 if problem.double else 1,), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            plgpu.Barrier(num_barriers=slots),
            plgpu.Barrier(num_arrivals=layout.multipliers, num_barriers=slots),
        ],
        compiler_params=mg.COMPILER_PARAMS,
    )
    return lambda operands: kernel(*operands)
