"""QTensor: a quantized weight as a pytree.

Two layouts hold the codes of one slice, whose contract axes (the ones a matmul sums over) are
flattened to K and whose other axes are the outputs:

- "rows", whenever `K % block_size == 0`: `packed` uint8 [*out, K / 2] and scales
  [*out, K / block_size]. Blocks run along K. For a torch weight [out, in] these are bitsandbytes'
  own bytes, reshaped.
- "flat", otherwise: the weight in [*out, K] order as one line, whose blocks straddle rows and whose
  last may be short: `packed` [ceil(size / 2)], scales [ceil(size / block_size)].

The first of two codes sits in the high nibble. The 8-bit formats have one code a byte and one block
a row: `packed` [*out, K] and scales [*out, 1], always in rows. Axes in front of these are batch
axes (stacked layers, experts). They are never stored: they are what `packed` has more than a slice,
so that scan, vmap, stacking and indexing of the leaves keep every shape true.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lookup import lookup
from pallas_kernels.packing import unpack
from pallas_kernels.reach import out_of_reach
from pallas_kernels.scales import decode_scales
from qjax.core.codebook import codebook
from qjax.core.concrete import is_concrete
from qjax.core.config import QuantConfig
from qjax.core.decode_rows import decode_rows
from qjax.core.double_quant import DoubleQuant
from qjax.core.formats import Format, format_of
from qjax.core.placement import explicit_mesh, on_device, on_mesh, weight_sharding
from qjax.core.scales import (
    AffineScales,
    Scales,
    expected,
    float_scales,
    kernel_scales,
    scales_class,
)

# Scales below this can have products with a table entry (0.0052 or more) below the normal floats.
_SUBNORMAL_PRODUCTS = np.float32(2.0**-117)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A weight in 4 or 8 bits. Make one with `qjax.quantize`.

    Nothing is checked when a pytree is rebuilt, so leaves may be None, specs or tracers; `check`
    checks.

    Attributes:
        packed: uint8, two codes a byte; int8 or float8 in the 8-bit formats.
        scales: float32, or a pytree such as `DoubleQuant`.
        slice_shape: logical shape of one slice.
        dtype: logical dtype, that of the weight before and of `dequantize()`.
        format: as in `QuantConfig`.
        block_size: weights that share a scale; K in the 8-bit formats.
        contract_axes: axes of the slice that a matmul sums over, ascending.
        layout: "rows" or "flat".
        int8_threshold: as in `QuantConfig`.
    """

    packed: jax.Array
    scales: Scales
    slice_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    format: str = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})
    contract_axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    layout: str = dataclasses.field(metadata={"static": True})
    int8_threshold: float | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def kind(self) -> Format:
        """What a code and a scale are."""
        return format_of(self.format)

    @property
    def config(self) -> QuantConfig:
        """The config that quantizes like this."""
        block_size = self.block_size if self.kind.block_sizes else None
        threshold = self.int8_threshold
        return QuantConfig(self.format, block_size, self.double_quant, int8_threshold=threshold)

    @property
    def out_axes(self) -> tuple[int, ...]:
        """Axes of the slice that are not contracted, ascending."""
        return tuple(i for i in range(len(self.slice_shape)) if i not in self.contract_axes)

    @property
    def contract_shape(self) -> tuple[int, ...]:
        """Sizes of the contract axes; their product is K."""
        return tuple(self.slice_shape[i] for i in self.contract_axes)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Sizes of the other axes."""
        return tuple(self.slice_shape[i] for i in self.out_axes)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the axes in front of a slice."""
        slice_ndim = len(self.out_shape) + 1 if self.layout == "rows" else 1
        return tuple(self.packed.shape[: self.packed.ndim - slice_ndim])

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, batch axes first."""
        return self.batch_shape + self.slice_shape

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def double_quant(self) -> bool:
        """Whether the scales are in 8 bits."""
        return isinstance(self.scales, DoubleQuant)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: codes, scales and second level."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_param(self) -> float:
        """Stored bits for each weight, scales included."""
        return 8 * self.nbytes / self.size

    @property
    def sharding(self) -> jax.sharding.NamedSharding | None:
        """The mesh sharding of the float array that this stands for; None if there is none."""
        return weight_sharding(self)

    @property
    def codebook(self) -> np.ndarray:
        """The format's float32 [16] table."""
        return codebook(self.format)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """Decode to `dtype` (default: the logical dtype), of the logical shape.

        Each value is the float32 product of table entry and scale, rounded once. Under `jit` XLA
        on a CPU turns subnormal products (below 1.2e-38) to zero; outside it they are exact.

        Example:
            >>> quantize(jnp.ones((64, 2))).dequantize().shape
            (64, 2)
        """
        dtype = jnp.dtype(self.dtype if dtype is None else dtype)
        q = on_device(self)
        if _meets_subnormals(q):
            return jax.device_put(_decode_ieee(q, dtype), q.sharding)
        if explicit_mesh(q.packed) is not None:
            return on_mesh(functools.partial(_decode, dtype=dtype), q.sharding, q)
        return _decode(q, dtype)

    def check(self, name: str = "QTensor") -> None:
        """Raise ValueError, naming `name`, unless the arrays fit the static description."""
        _check(self, name)

    def __repr__(self) -> str:
        block = f" b{self.block_size}" if self.kind.block_sizes else ""
        label = f"{self.format.upper()}{block}{' dq' if self.double_quant else ''}"
        if not hasattr(self.packed, "ndim"):
            return f"QTensor({label}, slice {self.slice_shape}, packed={self.packed!r})"
        size = f"{self.nbytes / 1e6:.3g} MB, {self.bits_per_param:.3f} bits/param"
        return f"QTensor({list(self.shape)} {jnp.dtype(self.dtype).name}, {label}, {size})"


def _decode(q: QTensor, dtype) -> jax.Array:
    # A kernel under vmap sees the whole stack.
    whole = out_of_reach(q.packed.size) is None
    decode = functools.partial(_decode_slice, dtype=dtype)
    for _ in q.batch_shape:
        decode = jax.vmap(decode) if whole else functools.partial(jax.lax.map, decode)
    return decode(q)


def _decode_slice(q: QTensor, dtype) -> jax.Array:
    decode = _decode_rows if q.layout == "rows" else _decode_flat
    ordered = decode(q, dtype).reshape(*q.out_shape, *q.contract_shape)
    return jnp.transpose(ordered, inverse(q.out_axes + q.contract_axes))


def _decode_rows(q: QTensor, dtype) -> jax.Array:
    packed = q.packed.reshape(-1, q.packed.shape[-1])
    if q.kind.bits == 8:
        absmax = float_scales(q.scales)
        return (packed.astype(jnp.float32) * absmax * q.kind.unit).astype(dtype)
    if isinstance(q.scales, AffineScales):
        return _decode_affine(packed, q.scales, q.block_size).astype(dtype)
    table = jnp.asarray(q.codebook)
    scales = kernel_scales(q.scales)
    return decode_rows(packed, scales, table, q.block_size, dtype)


def _decode_affine(packed, scales: AffineScales, block_size: int) -> jax.Array:
    codes = unpack(packed).astype(jnp.float32)
    blocks = codes.reshape(codes.shape[0], -1, block_size)
    scale, zero = (a.reshape(*blocks.shape[:2], 1) for a in (scales.scale, scales.zero))
    return ((blocks - zero.astype(jnp.float32)) * scale).reshape(codes.shape)


def _decode_flat(q: QTensor, dtype) -> jax.Array:
    size = math.prod(q.slice_shape)
    scales = decode_scales(kernel_scales(q.scales)).reshape(-1)
    block = np.arange(size) // q.block_size
    values = lookup(jnp.asarray(q.codebook), unpack(q.packed)[:size])
    return (values * lookup(scales, block)).astype(dtype)


def _meets_subnormals(q: QTensor) -> bool:
    if not isinstance(q.scales, jax.Array) or q.kind.bits == 8:
        return False
    if not (is_concrete(q.scales) and is_concrete(q.packed)):
        return False
    # A weight may be concrete inside a trace: closed over by the body of a scan.
    with jax.ensure_compile_time_eval():
        bits = jax.lax.bitcast_convert_type(q.scales, jnp.int32)
        return bool(((bits > 0) & (bits < _SUBNORMAL_PRODUCTS.view(np.int32))).any())


def _decode_ieee(q: QTensor, dtype) -> np.ndarray:
    packed, scales = np.asarray(q.packed), np.asarray(q.scales)
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(*packed.shape[:-1], -1)
    if q.layout == "flat":
        codes = codes[..., : math.prod(q.slice_shape)]
    block = np.arange(codes.shape[-1]) // q.block_size
    values = (q.codebook[codes] * scales[..., block]).astype(dtype)
    values = values.reshape(*q.batch_shape, *q.out_shape, *q.contract_shape)
    batch = len(q.batch_shape)
    order = [batch + axis for axis in inverse(q.out_axes + q.contract_axes)]
    return np.transpose(values, (*range(batch), *order))


def inverse(permutation: tuple[int, ...]) -> list[int]:
    """Return the permutation that undoes this one."""
    return [permutation.index(i) for i in range(len(permutation))]


def layout_for(contract_size: int, block_size: int) -> str:
    """Return "rows" where blocks fit the contracted size, else "flat"."""
    return "rows" if contract_size % block_size == 0 else "flat"


def array_shapes(q: QTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes that `packed` and the first-level scales of one slice must have."""
    size = math.prod(q.slice_shape)
    if q.layout == "flat":
        return (-(-size // 2),), (-(-size // q.block_size),)
    k = math.prod(q.contract_shape)
    return (*q.out_shape, k * q.kind.bits // 8), (*q.out_shape, k // q.block_size)


def _check(q: QTensor, name: str) -> None:
    k = math.prod(q.contract_shape)
    kind = format_of(q.format)
    if not kind.block_sizes and q.block_size != k:
        raise ValueError(f"{name}: block_size={q.block_size} of {q.format!r} must be K={k}")
    if q.layout != layout_for(k, q.block_size):
        raise ValueError(
            f"{name}: layout={q.layout!r} does not fit K={k} with block_size={q.block_size}"
        )
    batch = q.batch_shape
    packed, first = array_shapes(q)
    cls = scales_class(kind, q.double_quant)
    if (cls is None) != (not dataclasses.is_dataclass(q.scales)) or not isinstance(
        q.scales, cls or object
    ):
        needed = "a float32 array" if cls is None else cls.__name__
        raise ValueError(
            f"{name}: scales of {q.format!r} must be {needed}, got {type(q.scales).__name__}"
        )
    _check_array(f"{name}: packed", q.packed, batch + packed, kind.code_dtype)
    for field, (shape, dtype) in expected(cls, first).items():
        leaf = getattr(q.scales, field) if field else q.scales
        label = f"scales.{field}" if field else "scales"
        _check_array(f"{name}: {label}", leaf, batch + shape, dtype)


def _check_array(name: str, leaf: Any, shape: tuple[int, ...], dtype: Any) -> None:
    if tuple(leaf.shape) != shape or leaf.dtype != dtype:
        found = f"{leaf.dtype}{list(leaf.shape)}"
        raise ValueError(f"{name} must be {np.dtype(dtype).name}{list(shape)}, got {found}")
