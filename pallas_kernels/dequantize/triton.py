"""dequantize on Pallas-Triton: one pass over the packed bytes, bit-equal to the reference.

The rows layout is contiguous, so the kernel sees one flat array of bytes; a program decodes
`TILE` of them. A code is looked up in the float32 table (64 bytes: it lives in the L1 cache),
multiplied by its float32 scale and rounded once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.reach import out_of_reach
from pallas_kernels.triton_call import triton_call
from pallas_kernels.triton_scales import layer_index, operands

TILE = 2048  # bytes a program; 1024 to 4096 are within 2 % of each other on an H100


def dequantize(packed, scales, codebook, *, block_size, dtype, layer=None, interpret=False):
    """See `pallas_kernels.dequantize`. `interpret` runs the kernel's jnp on any device."""
    rows, half = packed.shape[-2:]
    spec, arrays = operands(scales, 2 * half // block_size, layer is not None, interpret)
    out = triton_call(
        functools.partial(_kernel, size=rows * half, half_block=block_size // 2, spec=spec),
        grid=pl.cdiv(rows * half, TILE),
        out_shape=jax.ShapeDtypeStruct((2 * rows * half,), dtype),
        interpret=interpret,
        name="dequantize_4bit_triton",
    )(layer_index(layer), packed.reshape(-1, rows * half), codebook, *arrays)
    return out.reshape(rows, 2 * half)


def unsupported(packed, scales, codebook, *, block_size, dtype, layer=None) -> str | None:
    """Why these arguments cannot run, or None."""
    if why := out_of_reach(packed.size):
        return why
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"dtype is {jnp.dtype(dtype)}; the kernel writes bfloat16, float16 and float32"
    return None


def _kernel(layer_ref, packed_ref, codebook_ref, *refs, size, half_block, spec):
    *scale_refs, out_ref = refs
    layer = layer_ref[0]
    byte = pl.program_id(0) * TILE + jax.lax.broadcasted_iota(jnp.int32, (TILE,), 0)
    inside = byte < size
    codes = plt.load(packed_ref.at[layer, byte], mask=inside, other=0).astype(jnp.int32)
    scale = spec.load(scale_refs, layer, byte // half_block, inside)
    pair = [
        (plt.load(codebook_ref.at[code]) * scale).astype(out_ref.dtype)
        for code in (codes >> 4, codes & 15)
    ]
    values = jnp.stack(pair, axis=-1).reshape(2 * TILE)
    weight = 2 * TILE * pl.program_id(0) + jax.lax.broadcasted_iota(jnp.int32, (2 * TILE,), 0)
    plt.store(out_ref.at[weight], values, mask=weight < 2 * size)
