"""quantize on Pallas-Triton: one pass over the weight, bit-equal to the reference.

A program takes `TILE` weights as rows of one block each: absmax by an integer maximum (the bits of
|x| order as the magnitudes do, NaN on top), then the code of each scaled value. Fifteen compares a
weight would cost more time than the bytes; instead the value's bin, of 2 / 2^bits wide, looks up
how many decision bounds lie below the bin and the one bound, if any, inside it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.quantize.reference import SMALLEST_SCALE, decision_bounds
from pallas_kernels.reach import out_of_reach
from pallas_kernels.triton_call import triton_call

TILE = 4096  # weights a program
_BINS_PER_UNIT = tuple(2**i for i in range(3, 12))
_INFINITY = 0x7F800000  # its bits; those of NaN are larger
_ROUNDER = np.float32(1.5 * 2**23)  # adding it leaves the rounded value in the low bits


def quantize(w, codebook, *, block_size, interpret=False):
    """See `pallas_kernels.quantize`. `interpret` runs the kernel's jnp on any device."""
    n, k = w.shape
    blocks = w.size // block_size
    rows = max(1, TILE // block_size)
    bins = bin_table(codebook)
    packed, absmax = triton_call(
        functools.partial(_kernel, bins=bins.per_unit, top=bins.top, interpret=interpret),
        grid=pl.cdiv(blocks, rows),
        out_shape=(
            jax.ShapeDtypeStruct((blocks, block_size // 2), jnp.uint8),
            jax.ShapeDtypeStruct((blocks,), jnp.float32),
        ),
        interpret=interpret,
        name="quantize_4bit_triton",
    )(w.reshape(blocks, block_size), bins.bound, bins.code)
    return packed.reshape(n, k // 2), absmax.reshape(n, k // block_size)


def unsupported(w, codebook, *, block_size) -> str | None:
    """Why these arguments cannot run, or None."""
    if why := out_of_reach(w.size // 2):
        return why
    if w.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"w is {w.dtype}; the kernel reads bfloat16, float16 and float32"
    if block_size & (block_size - 1):
        return f"block_size is {block_size}; the kernel needs a power of two"
    if bin_table(codebook) is None:
        return "two decision bounds of the codebook are closer than the kernel's finest bins"
    return None


class Bins(NamedTuple):
    """[-1, 1] cut so finely that a bin holds at most one decision bound.

    Value s is in bin `round(s * per_unit) + per_unit`; per_unit is a power of two, so the product
    is exact and host and device agree on the bin.

    Attributes:
        bound: float32 [4 * per_unit], the bound in each bin; infinity where there is none.
        code: uint8 [8 * per_unit], the code of each bin's values up to its bound, then, from the
            middle of the array on, above it.
        top: the code of NaN.
    """

    per_unit: int
    bound: np.ndarray
    code: np.ndarray
    top: int


def bin_table(codebook: np.ndarray) -> Bins | None:
    """The bins of a codebook; None if its decision bounds lie too close together."""
    bounds, order = decision_bounds(codebook)
    for per_unit in _BINS_PER_UNIT:
        places = np.rint(bounds * np.float32(per_unit)).astype(int) + per_unit
        if len(set(places)) == len(places):
            break
    else:
        return None
    size = 4 * per_unit
    bound = np.full(size, np.inf, np.float32)
    bound[places] = bounds
    below = np.searchsorted(places, np.arange(size))  # bounds in lower bins
    code = np.concatenate([order[below], order[np.minimum(below + 1, 15)]])
    return Bins(per_unit, bound, code, int(order[15]))


def _kernel(w_ref, bound_ref, code_ref, packed_ref, absmax_ref, *, bins, top, interpret):
    blocks, block_size = w_ref.shape
    rows = max(1, TILE // block_size)
    row = pl.program_id(0) * rows + jax.lax.broadcasted_iota(jnp.int32, (rows,), 0)

    def place(columns):
        """Index and mask of a [rows, columns] tile."""
        shape = (rows, columns)
        tile_row = jnp.broadcast_to(row[:, None], shape)
        return (tile_row, jax.lax.broadcasted_iota(jnp.int32, shape, 1)), tile_row < blocks

    index, inside = place(block_size)
    x = plt.load(w_ref.at[index], mask=inside, other=0.0).astype(jnp.float32)
    largest = jnp.max(jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF, axis=1)
    absmax = jax.lax.bitcast_convert_type(largest, jnp.float32)
    plt.store(absmax_ref.at[row], absmax, mask=row < blocks)
    # Triton's maximum of NaN and a number is the number; NaN must stay.
    scale = jnp.where(largest > _INFINITY, absmax, jnp.maximum(absmax, SMALLEST_SCALE))
    scale = jnp.where(largest == 0, np.float32(1), scale)
    s = x * _reciprocal(scale, interpret)[:, None]
    nan = s != s
    # The float32 sum has round(s * bins) in its low bits; the mask keeps NaN inside the table.
    rounded = jax.lax.bitcast_convert_type(s * np.float32(bins) + _ROUNDER, jnp.int32)
    bin = (rounded - int(_ROUNDER.view(np.int32)) + bins) & (4 * bins - 1)
    above = s > plt.load(bound_ref.at[bin])
    code = plt.load(code_ref.at[bin + jnp.where(above, 4 * bins, 0)]).astype(jnp.int32)
    code = jnp.where(nan, top, code)
    even = jax.lax.broadcasted_iota(jnp.int32, code.shape, 1) % 2 == 0
    pairs = jnp.where(even, code << 4, code).reshape(rows, block_size // 2, 2)
    index, inside = place(block_size // 2)
    plt.store(packed_ref.at[index], jnp.sum(pairs, axis=2).astype(jnp.uint8), mask=inside)


def _reciprocal(x, interpret):
    """1 / x, correctly rounded: Triton's own division is not."""
    if interpret:
        return np.float32(1) / x
    [reciprocal] = plt.elementwise_inline_asm(
        "rcp.rn.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return reciprocal
