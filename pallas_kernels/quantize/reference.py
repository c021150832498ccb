"""Blockwise absmax quantization in plain jnp, bit-equal to bitsandbytes on a CPU.

Every step is float32: `s = x * (1 / absmax)`, then the number of decision bounds (midpoints of the
sorted codebook) below `s`. A tie goes to the lower value and NaN to the top one.

XLA on a CPU reads subnormal floats as zero. IEEE arithmetic, which bitsandbytes uses, does not, so
the few steps that meet subnormals work on the bits.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lookup import lookup
from pallas_kernels.packing import pack

SMALLEST_SCALE = np.float32(1e-38)  # bitsandbytes divides by at least this
_TINY = np.float32(2.0**-64)  # blocks with a smaller absmax are computed 2**100 times larger
_UP = 100


def decision_bounds(codebook: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 15 midpoints of the sorted float32 codebook, and the code of each place."""
    table = np.asarray(codebook, np.float32)
    # Of two equal values (FP4's zeros) the lower code comes first.
    order = np.argsort(table, kind="stable").astype(np.uint8)
    ordered = table[order]
    return (ordered[:-1] + ordered[1:]) / np.float32(2), order


def encode(scaled: jax.Array, codebook: np.ndarray) -> jax.Array:
    """Return the uint8 code of the codebook value nearest to each float32 value in [-1, 1]."""
    bounds, order = decision_bounds(codebook)
    place = jnp.zeros(scaled.shape, jnp.uint8)
    for bound in bounds:  # fifteen fused compares: no temporary 16 times the weight
        place = place + (~(scaled <= bound)).astype(jnp.uint8)
    return place if np.array_equal(order, np.arange(16)) else lookup(order, place)


def normalize(blocks: jax.Array, *, divide: bool = False) -> tuple[jax.Array, jax.Array]:
    """Scale float32 [..., block_size] to [-1, 1] by its absmax, as IEEE arithmetic would.

    Args:
        blocks: float32 [..., block_size].
        divide: divide by absmax instead of multiplying by its reciprocal.

    Returns:
        The scaled blocks and absmax float32 [...], NaN for a block that holds one.
    """
    bits = jax.lax.bitcast_convert_type(blocks, jnp.int32) & 0x7FFFFFFF
    largest = jnp.max(bits, axis=-1)  # order of bits = order of magnitudes, NaN on top
    absmax = jax.lax.bitcast_convert_type(largest, jnp.float32)
    tiny = largest < _TINY.view(np.int32)
    floor = np.float32(np.float64(SMALLEST_SCALE) * 2.0**_UP)
    scale = jnp.where(tiny, jnp.maximum(_times_2_100(absmax, largest), floor), absmax)
    values = jnp.where(tiny[..., None], _times_2_100(blocks, bits), _flushed(blocks, bits))
    if divide:
        scaled = values / scale[..., None]
    else:
        scaled = values * (np.float32(1) / scale)[..., None]
    return jnp.clip(scaled, -1.0, 1.0), absmax


def _times_2_100(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Return |x| < 2**-64 times 2**100, exact for subnormals too; `bits` are those of |x|."""
    subnormal = jnp.copysign(bits.astype(jnp.float32) * np.float32(2.0 ** (_UP - 149)), x)
    return jnp.where(bits < 0x00800000, subnormal, x * np.float32(2.0**_UP))


def _flushed(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Return x with subnormals as 2**-80: beside a larger absmax only their sign counts."""
    subnormal = (bits > 0) & (bits < 0x00800000)
    return jnp.where(subnormal, jnp.copysign(np.float32(2.0**-80), x), x)


def quantize(w: jax.Array, codebook: np.ndarray, *, block_size: int) -> tuple[jax.Array, jax.Array]:
    """Quantize rows in blocks of `block_size` along the last axis.

    Args:
        w: float [N, K], K a multiple of `block_size`.
        codebook: float32 [16], known when tracing.

    Returns:
        packed uint8 [N, K // 2] and absmax float32 [N, K // block_size]. A block with a NaN has
        absmax NaN; a block of zeros has absmax 0.
    """
    blocks = to_float32(w).reshape(*w.shape[:-1], w.shape[-1] // block_size, block_size)
    scaled, absmax = normalize(blocks)
    return pack(encode(scaled, codebook).reshape(w.shape)), absmax


def to_float32(w: jax.Array) -> jax.Array:
    """Widen to float32, subnormals kept: bfloat16 is the upper half of a float32's bits."""
    if w.dtype != jnp.bfloat16:
        return w.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(w, jnp.uint16).astype(jnp.uint32) << 16
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
