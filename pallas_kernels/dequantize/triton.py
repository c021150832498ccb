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

from pallas_kernels.scales import SECOND_LEVEL_BLOCK, DoubleQuantScales

TILE = 2048  # bytes a program
NUM_WARPS = 4
MAX_ELEMENTS = 2**31  # Triton offsets are 32 bits


def dequantize(packed, scales, codebook, *, block_size, dtype, layer=None, interpret=False):
    """See `pallas_kernels.dequantize`. `interpret` runs the kernel's jnp on any device."""
    size = packed.shape[-2] * packed.shape[-1]  # bytes in one layer
    double = isinstance(scales, DoubleQuantScales)
    arrays = list(scales[:4]) if double else [scales]
    layered = layer is not None
    arrays[: 3 if double else 1] = [
        a.reshape(a.shape[0], -1) if layered else a.reshape(1, -1)
        for a in arrays[: 3 if double else 1]
    ]
    origin = getattr(scales, "origin", None)
    position = jnp.zeros(2, jnp.int32) if origin is None else origin.astype(jnp.int32)
    index = jnp.reshape(jnp.asarray(layer if layered else 0, jnp.int32), (1,))
    blocks = packed.shape[-1] * 2 // block_size  # in a row
    kernel = functools.partial(
        _kernel,
        size=size,
        half_block=block_size // 2,
        blocks=blocks,
        pitch=(scales.pitch or blocks) if double else None,
        shifted=origin is not None,
        interpret=interpret,
    )
    out = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(size, TILE),),
        out_shape=jax.ShapeDtypeStruct((2 * size,), dtype),
        compiler_params=plt.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
        interpret=interpret,
        name="dequantize_4bit_triton",
    )(index, position, packed.reshape(-1, size), codebook, *arrays)
    return out.reshape(packed.shape[-2], 2 * packed.shape[-1])


def unsupported(packed, scales, codebook, *, block_size, dtype, layer=None) -> str | None:
    """Why these arguments cannot run, or None."""
    if packed.size >= MAX_ELEMENTS:
        return f"packed has {packed.size} bytes, and Triton's 32-bit offsets stop at {MAX_ELEMENTS}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"dtype is {jnp.dtype(dtype)}; the kernel writes bfloat16, float16 and float32"
    return None


def _kernel(
    layer_ref,
    origin_ref,
    packed_ref,
    codebook_ref,
    *refs,
    size,
    half_block,
    blocks,
    pitch,
    shifted,
    interpret,
):
    *scale_refs, out_ref = refs
    layer = layer_ref[0]
    byte = pl.program_id(0) * TILE + jax.lax.broadcasted_iota(jnp.int32, (TILE,), 0)
    inside = byte < size
    codes = plt.load(packed_ref.at[layer, byte], mask=inside, other=0).astype(jnp.int32)
    block = byte // half_block
    scale = _scale(scale_refs, layer, block, inside, origin_ref, blocks, pitch, shifted, interpret)
    pair = [
        (plt.load(codebook_ref.at[code]) * scale).astype(out_ref.dtype)
        for code in (codes >> 4, codes & 15)
    ]
    values = jnp.stack(pair, axis=-1).reshape(2 * TILE)
    weight = 2 * TILE * pl.program_id(0) + jax.lax.broadcasted_iota(jnp.int32, (2 * TILE,), 0)
    plt.store(out_ref.at[weight], values, mask=weight < 2 * size)


def _scale(refs, layer, block, inside, origin_ref, blocks, pitch, shifted, interpret):
    """The float32 scale of each block: read, or decoded as `scales.decode_scales` does."""
    if pitch is None:
        return plt.load(refs[0].at[layer, block], mask=inside, other=0.0)
    codes_ref, absmax_ref, offset_ref, table_ref = refs
    code = plt.load(codes_ref.at[layer, block], mask=inside, other=0).astype(jnp.int32)
    place = block
    if shifted or pitch != blocks:
        row = block // blocks
        place = (row + origin_ref[0]) * pitch + (block - row * blocks) + origin_ref[1]
    group = place // SECOND_LEVEL_BLOCK
    absmax = plt.load(absmax_ref.at[layer, group], mask=inside, other=0.0)
    product = _product(plt.load(table_ref.at[code]), absmax, interpret)
    return product + offset_ref[layer, 0]


def _product(a, b, interpret):
    """a * b, rounded by itself: assembly, since the compiler would fuse the addition that follows."""
    if interpret:
        return jax.lax.optimization_barrier(a * b)
    [product] = plt.elementwise_inline_asm(
        "mul.rn.f32 $0, $1, $2;",
        args=[a, b],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, a.dtype)],
    )
    return product
