"""Codes and scales of rows [N, K], for each way of scaling."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import quantize as quantize_rows
from pallas_kernels.packing import pack
from pallas_kernels.quantize.reference import to_float32
from qjax.core.codebook import codebook
from qjax.core.formats import Format
from qjax.core.scales import AffineScales, Float8Scales, PowerScales, Scales

_E2M1_LARGEST = np.float32(6)
_E2M1_EXPONENT = 2  # of its largest value
_E4M3_LARGEST = np.float32(448)
# Between neighbouring magnitudes of E2M1; a tie goes to the even code, every second one upwards.
_E2M1_BOUNDS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False),
                (3.5, True), (5.0, False))  # fmt: skip


def encode_rows(rows: jax.Array, format: Format, block_size: int) -> tuple:
    """Quantize float [N, K] in blocks along K.

    Returns:
        packed [N, K / 2] or, in 8 bits, [N, K]; the scales of the format, [N, K / block_size] each
        (or a scalar of the whole weight); whether all weights are finite.
    """
    if format.bits == 8:
        return _eight_bit(to_float32(rows), format)
    if format.scaling == "absmax":
        packed, absmax = quantize_rows(rows, codebook(format.name), block_size=block_size)
        return packed, absmax, jnp.isfinite(absmax).all()
    rows = to_float32(rows)
    finite = jnp.isfinite(rows).all()
    blocks = rows.reshape(rows.shape[0], -1, block_size)
    encode = {"affine": _affine, "power": _power, "fp8": _fp8}[format.scaling]
    codes, scales = encode(blocks)
    return pack(codes.reshape(rows.shape).astype(jnp.uint8)), scales, finite


def _eight_bit(rows: jax.Array, format: Format) -> tuple[jax.Array, Scales, jax.Array]:
    absmax = jnp.max(jnp.abs(rows), axis=-1, keepdims=True)
    # Torch, and so bitsandbytes, divides a number by an array in this way.
    scaled = rows * jnp.where(absmax > 0, np.float32(1) / absmax * format.largest, 0)
    if format.code_dtype.kind == "i":
        scaled = jnp.round(scaled)
    return scaled.astype(format.code_dtype), absmax, jnp.isfinite(absmax).all()


def _affine(blocks: jax.Array) -> tuple[jax.Array, Scales]:
    low = jnp.minimum(jnp.min(blocks, axis=-1, keepdims=True), 0)
    high = jnp.maximum(jnp.max(blocks, axis=-1, keepdims=True), 0)
    scale = (high - low) / np.float32(15)
    reciprocal = jnp.where(scale > 0, np.float32(1) / scale, 0)
    zero = jnp.round(-low * reciprocal)
    codes = jnp.clip(jnp.round(blocks * reciprocal) + zero, 0, 15)
    return codes, AffineScales(scale[..., 0], zero[..., 0].astype(jnp.uint8))


def _power(blocks: jax.Array) -> tuple[jax.Array, Scales]:
    bits = jax.lax.bitcast_convert_type(jnp.max(jnp.abs(blocks), axis=-1), jnp.int32)
    exponents = jnp.clip((bits >> 23) - _E2M1_EXPONENT, 0, 254).astype(jnp.uint8)
    scales = PowerScales(exponents)
    return _e2m1(blocks / scales.decode()[..., None]), scales


def _fp8(blocks: jax.Array) -> tuple[jax.Array, Scales]:
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    largest = jnp.max(absmax) / (_E4M3_LARGEST * _E2M1_LARGEST)
    whole = jnp.where(largest > 0, largest, np.float32(1))
    codes = (absmax / (_E2M1_LARGEST * whole)).astype(jnp.float8_e4m3fn)
    # On a GPU XLA leaves out a rounding that is undone, and the weights must fit the stored scale.
    scales = Float8Scales(jax.lax.optimization_barrier(codes), whole)
    scale = scales.decode()[..., None]
    return _e2m1(blocks * jnp.where(scale > 0, np.float32(1) / scale, 0)), scales


def _e2m1(scaled: jax.Array) -> jax.Array:
    """Return the code of the nearest E2M1 number: a sign bit, then the place of the magnitude."""
    magnitude = jnp.abs(scaled)
    code = jnp.where(jnp.signbit(scaled), 8, 0)
    for bound, tie_up in _E2M1_BOUNDS:
        above = magnitude >= bound if tie_up else magnitude > bound
        code = code + above.astype(code.dtype)
    return code
