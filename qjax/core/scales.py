"""The kinds of scales a QTensor can have: a float32 array, or one of the pytrees here.

Each class says what its arrays are for given first-level scales (`expected`) and gives the float32
scales (`decode`). Double quantization has a file of its own.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.scales import SECOND_LEVEL_BLOCK, DoubleQuantScales
from qjax.core.double_quant import DoubleQuant, kernel_form, take_scales
from qjax.core.formats import Format

Expected = dict[str, tuple[tuple[int, ...], Any]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AffineScales:
    """A step and a zero point for each block.

    Attributes:
        scale: float32.
        zero: uint8 of the same shape, the code (0 to 15) that stands for zero.
    """

    scale: jax.Array
    zero: jax.Array

    def decode(self) -> jax.Array:
        """Return the steps."""
        return self.scale

    def offsets(self) -> jax.Array:
        """Return what is added to each weight of a block, once its code counts from -8."""
        return self.scale * (np.float32(8) - self.zero.astype(jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PowerScales:
    """Powers of two: OCP's E8M0.

    Attributes:
        exponents: uint8, the exponent plus 127; 255 is NaN.
    """

    exponents: jax.Array

    def decode(self) -> jax.Array:
        """Return the powers, float32."""
        bits = self.exponents.astype(jnp.int32) << 23
        bits = jnp.where(self.exponents == 0, 1 << 22, bits)  # 2**-127 is subnormal
        bits = jnp.where(self.exponents == 255, 0x7FC00000, bits)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Float8Scales:
    """E4M3 numbers times one float32.

    Attributes:
        codes: float8_e4m3fn.
        scale: float32 [*batch], one for each slice.
    """

    codes: jax.Array
    scale: jax.Array

    def decode(self) -> jax.Array:
        """Return the products, float32."""
        codes = self.codes.astype(jnp.float32)
        return codes * self.scale.reshape(*self.scale.shape, *[1] * (codes.ndim - self.scale.ndim))


Scales = jax.Array | DoubleQuant | AffineScales | PowerScales | Float8Scales
CLASSES = (DoubleQuant, AffineScales, PowerScales, Float8Scales)


def scales_class(format: Format, double_quant: bool) -> type | None:
    """Return the class of a format's scales; None for float32."""
    if format.scaling == "absmax":
        return DoubleQuant if double_quant else None
    return {"affine": AffineScales, "power": PowerScales, "fp8": Float8Scales}[format.scaling]


def expected(cls: type | None, first: tuple[int, ...]) -> Expected:
    """Return the shape and dtype in one slice of each array, for first-level scales of a shape."""
    groups = -(-math.prod(first) // SECOND_LEVEL_BLOCK)
    u8, f32 = np.uint8, np.float32
    return {
        None: {"": (first, f32)},
        DoubleQuant: {"codes": (first, u8), "absmax": ((groups,), f32), "offset": ((), f32)},
        AffineScales: {"scale": (first, f32), "zero": (first, u8)},
        PowerScales: {"exponents": (first, u8)},
        Float8Scales: {"codes": (first, jnp.float8_e4m3fn), "scale": ((), f32)},
    }[cls]


def map_scales(cls: type | None, first: Any, groups: Any, whole: Any) -> Any:
    """Return scales that hold, for each array, one of three things.

    Args:
        first: for arrays of the shape of the scales.
        groups: for those with one axis a slice (the second level of double quantization).
        whole: for those with one number a slice.
    """
    if cls is None:
        return first
    sizes = {name: len(shape) for name, (shape, _) in expected(cls, (1, 1)).items()}
    return cls(**{name: (whole, groups, first)[size] for name, size in sizes.items()})


def kernel_scales(scales: Scales) -> jax.Array | DoubleQuantScales:
    """Return the scales [*rows, blocks] of one slice as the kernels take them: [N, blocks]."""
    if isinstance(scales, DoubleQuant):
        return kernel_form(scales)
    if isinstance(scales, CLASSES):
        scales = scales.decode()
    return scales.reshape(-1, scales.shape[-1])


def float_scales(scales: Scales) -> jax.Array:
    """Return scales that are known to be float32 [..., blocks] as [N, blocks]."""
    return jnp.reshape(scales, (-1, scales.shape[-1]))  # type: ignore[union-attr]


def rows_of(scales: Scales, rows: jax.Array) -> Scales:
    """Return the scales of some rows of a two-dimensional slice, double quantization decoded."""
    if isinstance(scales, DoubleQuant):
        return take_scales(scales, rows)
    if isinstance(scales, Float8Scales):
        return dataclasses.replace(scales, codes=scales.codes[rows])
    return jax.tree.map(lambda leaf: leaf[rows], scales)
