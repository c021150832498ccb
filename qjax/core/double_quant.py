"""Double quantization: the scales themselves in 8 bits (QLoRA section 3; "nested" elsewhere).

The mean of a weight's scales is subtracted; what is left is quantized in flat blocks of 256 with an
absmax each and the 256-entry "dynamic" table, whose step shrinks towards zero.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lookup import lookup
from pallas_kernels.scales import SECOND_LEVEL_BLOCK, DoubleQuantScales, add_rounded, decode_scales


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DoubleQuant:
    """Scales in two levels; each batch slice of a weight has a second level of its own.

    Attributes:
        codes: uint8, of the shape of the scales.
        absmax: float32 [*batch, ceil(scales in a slice / 256)].
        offset: float32 [*batch], the mean that was subtracted.
    """

    codes: jax.Array
    absmax: jax.Array
    offset: jax.Array


@functools.cache
def dynamic_table(signed: bool = True) -> np.ndarray:
    """Return bitsandbytes' dynamic map: float32 [256], ascending, from -0.993 (or 0) to 1.

    For each exponent i of 0..6 the midpoints of 2**i equal steps from 0.1 to 1, times 10**(i - 6),
    of both signs, or twice as many steps of one sign; then 0 and 1 (Dettmers, 8-bit
    approximations, 2015).
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = _linspace(0.1, 1.0, (1 if signed else 2) * 2**i + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = means * np.float32(10.0 ** (i - 6))
        values += [*scaled, *-scaled] if signed else [*scaled]
    table = np.sort(np.array(values, np.float32))
    table.setflags(write=False)
    return table


def _linspace(start: float, stop: float, count: int) -> np.ndarray:
    """Return torch.linspace in float32: single-rounded steps from whichever end is nearer."""
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(count - 1))
    index = np.arange(count)
    low = np.float64(first) + step * index
    high = np.float64(last) - step * (count - 1 - index)
    return np.where(index < count // 2, low, high).astype(np.float32)


def quantize_scales(scales: jax.Array) -> DoubleQuant:
    """Quantize the float32 scales of one slice, of any shape, to 8 bits.

    Like bitsandbytes' CPU encoder it rounds to a grid of 65,536 points first and then to the
    nearest table entry; in exact arithmetic a few codes in a million would differ.
    """
    # The barrier makes the mean one number: fused into its users it could be rounded differently.
    offset = jax.lax.optimization_barrier(jnp.mean(scales))
    flat = (scales - offset).reshape(-1)
    padding = -flat.size % SECOND_LEVEL_BLOCK
    blocks = jnp.pad(flat, (0, padding)).reshape(-1, SECOND_LEVEL_BLOCK)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    positive = absmax > 0
    reciprocal = jnp.where(positive, np.float32(1) / absmax, np.float32(0))
    scaled = jnp.clip(blocks * reciprocal[:, None], -1.0, 1.0)
    codes = lookup(_grid_codes(), jnp.floor((scaled + 1.0) * 0.5 * 65535.0 + 0.5))
    codes = jnp.where(positive[:, None], codes, np.uint8(0)).reshape(-1)[: flat.size]
    return DoubleQuant(codes.reshape(scales.shape), absmax, offset)


@functools.cache
def _grid_codes() -> np.ndarray:
    """Return the uint8 code nearest to each of 65,536 points from -1 to 1."""
    table = dynamic_table()
    points = np.arange(65536, dtype=np.float32) / np.float32(65535) * np.float32(2) - np.float32(1)
    bounds = (table[:-1] + table[1:]) / np.float32(2)
    return np.searchsorted(bounds, points).astype(np.uint8)


def kernel_form(scales: DoubleQuant, batch_ndim: int = 0) -> DoubleQuantScales:
    """Return scales [*batch, *rows, blocks] as the kernels take them: [*batch, N, blocks]."""
    codes = scales.codes
    codes = codes.reshape(*codes.shape[:batch_ndim], -1, codes.shape[-1])
    return DoubleQuantScales(codes, scales.absmax, scales.offset, jnp.asarray(dynamic_table()))


def single_level(scales: DoubleQuant) -> jax.Array:
    """Return the float32 scales that a DoubleQuant stands for, of the shape of its codes."""

    def one(scales):
        return decode_scales(kernel_form(scales)).reshape(scales.codes.shape)

    for _ in scales.offset.shape:
        one = jax.vmap(one)
    return one(scales)


def take_scales(scales: DoubleQuant, rows: jax.Array) -> jax.Array:
    """Return the float32 scales [len(rows), blocks] of some rows of a two-dimensional slice."""
    codes = scales.codes[rows]
    flat = rows[:, None] * codes.shape[-1] + np.arange(codes.shape[-1], dtype=np.int32)[None]
    products = lookup(dynamic_table(), codes) * lookup(scales.absmax, flat // SECOND_LEVEL_BLOCK)
    return add_rounded(products, scales.offset)
