"""The formats: what a code is, and what a scale is.

A 4-bit code is an index into a table (`codebook.py`), two to a byte. An 8-bit code is a number
itself. `scaling` says how the codes of a block are scaled:

    absmax  by a float32, the largest magnitude of the block (or its double quantization)
    affine  float32 step and 4-bit zero point: (code - zero) * scale, as GPTQ and AWQ have it
    power   by a power of two: OCP Microscaling (MX) 1.0, section 5.4
    fp8     by an E4M3 number and one float32 of the whole weight: NVIDIA's NVFP4
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from qjax.core.codebook import CODEBOOKS, checked_table

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclasses.dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: as in `QuantConfig.format`.
        scaling: "absmax", "affine", "power" or "fp8".
        block_size: weights that share a scale unless the config says otherwise; None is a row.
        block_sizes: the sizes that can be asked for; none if a row has one scale.
        code_dtype: uint8 with two codes a byte, or the 8-bit number.
    """

    name: str
    scaling: str = "absmax"
    block_size: int | None = 64
    block_sizes: tuple[int, ...] = BLOCK_SIZES
    code_dtype: np.dtype = np.dtype(np.uint8)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4 if self.name in CODEBOOKS else 8

    @property
    def can_double_quant(self) -> bool:
        """Whether its scales can be stored in 8 bits."""
        return self.bits == 4 and self.scaling == "absmax"

    @property
    def largest(self) -> np.float32:
        """The 8-bit code that stands for the absmax."""
        integer = self.code_dtype.kind == "i"
        info = np.iinfo(self.code_dtype) if integer else jnp.finfo(self.code_dtype)
        return np.float32(info.max)

    @property
    def unit(self) -> np.float32:
        """What one is worth in an 8-bit code, for an absmax of 1."""
        return np.float32(1) / self.largest


def _row(name: str, dtype) -> Format:
    return Format(name, "absmax", None, (), np.dtype(dtype))


_FORMATS = {
    f.name: f
    for f in (
        Format("nf4"),
        Format("fp4"),
        Format("fp4_e2m1"),
        Format("int4"),
        Format("int4_asym", "affine"),
        Format("mxfp4", "power", 32, (32,)),
        Format("nvfp4", "fp8", 16, (16,)),
        _row("int8", np.int8),
        _row("fp8_e4m3", jnp.float8_e4m3fn),
        _row("fp8_e5m2", jnp.float8_e5m2),
    )
}

BUILTIN = tuple(_FORMATS)


def format_of(name: str) -> Format:
    """Return the format of a name.

    Raises:
        ValueError: it is not known.
    """
    if name not in _FORMATS:
        raise ValueError(f"format must be one of {sorted(_FORMATS)}, got {name!r}")
    return _FORMATS[name]


def register_format(name: str, values) -> None:
    """Make a 4-bit format of your own table, for this process.

    Weights are scaled by the absmax of their block and stored as the nearest entry.

    Args:
        name: what `QuantConfig(format=...)` will call it.
        values: sixteen increasing floats, the largest magnitude 1.

    Raises:
        ValueError: the values are not such, or the name stands for another table.

    Example:
        >>> qjax.register_format("linear4", np.linspace(-1, 1, 16))
        >>> qjax.quantize(jnp.ones((64, 2)), qjax.QuantConfig(format="linear4")).format
        'linear4'
    """
    table = checked_table(name, values)
    if name in _FORMATS and not np.array_equal(CODEBOOKS.get(name, 0), table):
        raise ValueError(f"format {name!r} is taken: it stands for another table")
    CODEBOOKS[name] = table
    _FORMATS[name] = Format(name)
