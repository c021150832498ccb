"""matmul on Pallas-Triton for few rows of x: the kernel of GPUs before Hopper.

A program owns `rows` weight rows and walks along K. The high nibbles of its bytes meet the even
columns of x and the low nibbles the odd ones, so nothing is interleaved. Up to `DOT_FROM` rows of x
products are summed elementwise; above, they are two tensor-core dots a step.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.triton_scales import layer_index, operands

MAX_ROWS = 64
DOT_FROM = 5
MAX_ELEMENTS = 2**31  # Triton offsets are 32 bits


def matmul(
    x, packed, scales, codebook, *, block_size, transpose=False, layer=None, interpret=False
):
    """See `pallas_kernels.matmul`. `interpret` runs the kernel's jnp on any device."""
    del transpose
    m, k = x.shape
    n, half = packed.shape[-2:]
    dots = m >= DOT_FROM
    columns = max(16, pl.next_power_of_2(m)) if dots else m
    spec, arrays = operands(scales, k // block_size, layer is not None, interpret)
    rows, step = (32, 128) if dots else (4, min(1024, pl.next_power_of_2(half)))
    planes = [jnp.pad(x[:, i::2], ((0, columns - m), (0, 0))) for i in range(2)]
    planes = [plane.T for plane in planes] if dots else planes
    y = pl.pallas_call(
        functools.partial(
            _kernel, shape=(n, half), rows=rows, step=step, half_block=block_size // 2, spec=spec
        ),
        grid=(pl.cdiv(n, rows),),
        out_shape=jax.ShapeDtypeStruct((n, columns), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="matmul_4bit_triton",
    )(layer_index(layer), packed.reshape(-1, n * half), codebook, *planes, *arrays)
    return y[:, :m].T


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
    if packed.size >= MAX_ELEMENTS:
        return f"packed has {packed.size} bytes, and Triton's 32-bit offsets stop at {MAX_ELEMENTS}"
    return None


def _kernel(
    layer_ref, packed_ref, codebook_ref, even_ref, odd_ref, *refs, shape, rows, step, half_block, spec
):
    *scale_refs, out_ref = refs
    n, half = shape
    layer, columns = layer_ref[0], out_ref.shape[1]
    dots = columns >= 16
    row = pl.program_id(0) * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, step), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, step), 1)

    def decode(i):
        """The even and odd columns of a step's weights, in float32, 0 outside."""
        byte = i * step + lane
        inside = (row < n) & (byte < half)
        codes = plt.load(packed_ref.at[layer, row * half + byte], mask=inside, other=0)
        codes = codes.astype(jnp.int32)
        block = row * spec.blocks + byte // half_block
        scale = spec.load(scale_refs, layer, block, inside)
        return [plt.load(codebook_ref.at[code]) * scale for code in (codes >> 4, codes & 15)]

    def dot_step(i, acc):
        place = i * step + jax.lax.broadcasted_iota(jnp.int32, (step, columns), 0)
        column = jax.lax.broadcasted_iota(jnp.int32, (step, columns), 1)
        for w, ref in zip(decode(i), (even_ref, odd_ref)):
            x = plt.load(ref.at[place, column], mask=place < half, other=0)
            precision = "highest" if x.dtype == jnp.float32 else None
            acc = acc + jnp.dot(
                w.astype(x.dtype), x, preferred_element_type=jnp.float32, precision=precision
            )
        return acc

    def sum_step(i, sums):
        place = i * step + jax.lax.broadcasted_iota(jnp.int32, (step,), 0)
        weights = decode(i)
        out = []
        for m, total in enumerate(sums):
            for w, ref in zip(weights, (even_ref, odd_ref)):
                index = jnp.full(place.shape, m, jnp.int32), place
                x = plt.load(ref.at[index], mask=place < half, other=0).astype(jnp.float32)
                total = total + w * x[None, :]
            out.append(total)
        return tuple(out)

    steps = pl.cdiv(half, step)
    out_row = pl.program_id(0) * rows + jax.lax.broadcasted_iota(jnp.int32, (rows,), 0)
    if dots:
        acc = jax.lax.fori_loop(0, steps, dot_step, jnp.zeros((rows, columns), jnp.float32))
        index = (
            jnp.broadcast_to(out_row[:, None], acc.shape),
            jax.lax.broadcasted_iota(jnp.int32, acc.shape, 1),
        )
        plt.store(out_ref.at[index], acc.astype(out_ref.dtype), mask=index[0] < n)
        return
    zero = jnp.zeros((rows, step), jnp.float32)
    sums = jax.lax.fori_loop(0, steps, sum_step, (zero,) * columns)
    for m, total in enumerate(sums):
        value = jnp.sum(total, axis=1).astype(out_ref.dtype)
        plt.store(out_ref.at[out_row, jnp.full((rows,), m, jnp.int32)], value, mask=out_row < n)
