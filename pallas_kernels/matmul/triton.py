"""matmul on Pallas-Triton for a few rows of x: the kernel of GPUs before Hopper.

A program owns `ROWS` weight rows and walks along K in steps of up to `STEP` bytes. The high nibbles
of its bytes meet the even columns of x and the low nibbles the odd ones, so nothing is interleaved;
the sum over a block is multiplied by its scale.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.reach import out_of_reach
from pallas_kernels.triton_call import triton_call
from pallas_kernels.triton_scales import layer_index, operands

MAX_ROWS = 4  # each row of x costs a multiply-add a weight
# Up to here it is chosen. 4096 x 4096 on an H100: 14 us for one row, where decoding first takes 32;
# a row more cost the first form of this kernel 7 us.
FAST_ROWS = 2
ROWS = 4
STEP = 2048


def matmul(
    x, packed, scales, codebook, *, block_size, transpose=False, layer=None, interpret=False
):
    """See `pallas_kernels.matmul`. `interpret` runs the kernel's jnp on any device."""
    del transpose
    m, k = x.shape
    n, half = packed.shape[-2:]
    spec, arrays = operands(scales, k // block_size, layer is not None, interpret)
    step = max(block_size // 2, min(STEP, pl.next_power_of_2(half)))
    planes = x.astype(jnp.float32).reshape(m, half, 2).transpose(2, 0, 1)
    y = triton_call(
        functools.partial(_kernel, half=half, step=step, half_block=block_size // 2, spec=spec),
        grid=pl.cdiv(n, ROWS),
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        interpret=interpret,
        name="matmul_4bit_triton",
    )(layer_index(layer), packed.reshape(-1, n * half), codebook, planes, *arrays)
    return y


def unsupported(
    x, packed, scales, codebook, *, block_size, transpose=False, layer=None
) -> str | None:
    """Why these arguments cannot run, or None."""
    if transpose:
        return "the kernel does not contract over N (transpose=True)"
    if x.shape[0] > MAX_ROWS:
        return f"x has {x.shape[0]} rows; the kernel takes at most {MAX_ROWS}"
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"x is {x.dtype}; the kernel multiplies bfloat16, float16 and float32"
    if block_size & (block_size - 1):
        return f"block_size is {block_size}; the kernel needs a power of two"
    if why := out_of_reach(packed.size):
        return why
    return None


def slower(x, *_, **options) -> str | None:
    """Why decoding first is estimated to be as fast, or None."""
    if x.shape[0] > FAST_ROWS:
        return (
            f"for {x.shape[0]} rows of x the weight is decoded first; above {FAST_ROWS} that wins"
        )
    return None


def _kernel(layer_ref, packed_ref, codebook_ref, x_ref, *refs, half, step, half_block, spec):
    *scale_refs, out_ref = refs
    m, n = out_ref.shape
    layer, first_row = layer_ref[0], pl.program_id(0) * ROWS
    blocks = step // half_block

    def tile(columns):
        """Weight row, column and both in range, of a [ROWS, columns] tile."""
        row = first_row + jax.lax.broadcasted_iota(jnp.int32, (ROWS, columns), 0)
        return row, jax.lax.broadcasted_iota(jnp.int32, (ROWS, columns), 1), row < n

    def add_step(i, sums):
        row, lane, inside = tile(step)
        byte = i * step + lane
        inside = inside & (byte < half)
        codes = plt.load(packed_ref.at[layer, row * half + byte], mask=inside, other=0)
        codes = codes.astype(jnp.int32)
        pair = [plt.load(codebook_ref.at[code]) for code in (codes >> 4, codes & 15)]
        row, lane, inside = tile(blocks)
        block = i * blocks + lane
        inside = inside & (block < spec.blocks)
        scale = spec.load(scale_refs, layer, row * spec.blocks + block, inside)
        place = i * step + jax.lax.broadcasted_iota(jnp.int32, (step,), 0)
        out = []
        for index, total in enumerate(sums):
            even, odd = (
                plt.load(x_ref.at[plane, index, place], mask=place < half, other=0.0)[None, :]
                for plane in range(2)
            )
            products = pair[0] * even + pair[1] * odd
            by_block = jnp.sum(products.reshape(ROWS, blocks, half_block), axis=2)
            out.append(total + jnp.sum(by_block * scale, axis=1))
        return tuple(out)

    zero = jnp.zeros((ROWS,), jnp.float32)
    sums = jax.lax.fori_loop(0, pl.cdiv(half, step), add_step, (zero,) * m)
    row = first_row + jax.lax.broadcasted_iota(jnp.int32, (ROWS,), 0)
    for index, total in enumerate(sums):
        plt.store(out_ref.at[index, row], total.astype(out_ref.dtype), mask=row < n)
