"""QTensor: a 4-bit weight as a pytree.

Two layouts hold the codes of one slice, whose contract axes (the ones a matmul sums over) are
flattened to K and whose other axes are the outputs:

- "rows", whenever `K % block_size == 0`: `packed` uint8 [*out, K / 2] and scales
  [*out, K / block_size]. Blocks run along K. For a torch weight [out, in] these are bitsandbytes'
  own bytes, reshaped.
- "flat", otherwise: the weight in [*out, K] order as one line, whose blocks straddle rows and whose
  last may be short: `packed` [ceil(size / 2)], scales [ceil(size / block_size)].

The first of two codes sits in the high nibble. Axes in front of these are batch axes (stacked
layers, experts). They are never stored: they are what `packed` has more than a slice, so that
scan, vmap, stacking and indexing of the leaves keep every shape true.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dequantize as dequantize_rows
from pallas_kernels.lookup import lookup
from pallas_kernels.packing import unpack
from pallas_kernels.scales import SECOND_LEVEL_BLOCK, decode_scales
from qjax.core.codebook import codebook
from qjax.core.concrete import is_concrete
from qjax.core.double_quant import DoubleQuant, kernel_scales
from qjax.core.placement import explicit_mesh, on_device, on_mesh, weight_sharding

# Scales below this can have products with a table entry (0.0052 or more) below the normal floats.
_SUBNORMAL_PRODUCTS = np.float32(2.0**-117)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A weight in 4 bits. Make one with `qjax.quantize`.

    Nothing is checked when a pytree is rebuilt, so leaves may be None, specs or tracers; `check`
    checks.

    Attributes:
        packed: uint8, two codes a byte.
        scales: float32, or a `DoubleQuant`.
        slice_shape: logical shape of one slice.
        dtype: logical dtype, that of the weight before and of `dequantize()`.
        format: "nf4" or "fp4".
        block_size: weights that share a scale.
        contract_axes: axes of the slice that a matmul sums over, ascending.
        layout: "rows" or "flat".
    """

    packed: jax.Array
    scales: jax.Array | DoubleQuant
    slice_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    format: str = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})
    contract_axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    layout: str = dataclasses.field(metadata={"static": True})

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
        label = f"{self.format.upper()} b{self.block_size}{' dq' if self.double_quant else ''}"
        if not hasattr(self.packed, "ndim"):
            return f"QTensor({label}, slice {self.slice_shape}, packed={self.packed!r})"
        size = f"{self.nbytes / 1e6:.3g} MB, {self.bits_per_param:.3f} bits/param"
        return f"QTensor({list(self.shape)} {jnp.dtype(self.dtype).name}, {label}, {size})"


def _decode(q: QTensor, dtype) -> jax.Array:
    decode = _decode_slice
    for _ in q.batch_shape:
        decode = jax.vmap(decode, in_axes=(0, None))
    return decode(q, dtype)


def _decode_slice(q: QTensor, dtype) -> jax.Array:
    decode = _decode_rows if q.layout == "rows" else _decode_flat
    ordered = decode(q, dtype).reshape(*q.out_shape, *q.contract_shape)
    return jnp.transpose(ordered, inverse(q.out_axes + q.contract_axes))


def _decode_rows(q: QTensor, dtype) -> jax.Array:
    packed = q.packed.reshape(-1, q.packed.shape[-1])
    table = jnp.asarray(q.codebook)
    scales = kernel_scales(q.scales)
    return dequantize_rows(packed, scales, table, block_size=q.block_size, dtype=dtype)


def _decode_flat(q: QTensor, dtype) -> jax.Array:
    size = math.prod(q.slice_shape)
    scales = decode_scales(kernel_scales(q.scales)).reshape(-1)
    block = np.arange(size) // q.block_size
    values = lookup(jnp.asarray(q.codebook), unpack(q.packed)[:size])
    return (values * lookup(scales, block)).astype(dtype)


def _meets_subnormals(q: QTensor) -> bool:
    if isinstance(q.scales, DoubleQuant) or not (is_concrete(q.scales) and is_concrete(q.packed)):
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
    return (*q.out_shape, k // 2), (*q.out_shape, k // q.block_size)


def _check(q: QTensor, name: str) -> None:
    codebook(q.format)
    k = math.prod(q.contract_shape)
    if q.layout != layout_for(k, q.block_size):
        raise ValueError(
            f"{name}: layout={q.layout!r} does not fit K={k} with block_size={q.block_size}"
        )
    batch = q.batch_shape
    packed, scales = array_shapes(q)
    first = q.scales.codes if isinstance(q.scales, DoubleQuant) else q.scales
    expected: dict[str, tuple] = {"packed": (q.packed, packed, np.uint8)}
    if isinstance(q.scales, DoubleQuant):
        groups = -(-math.prod(scales) // SECOND_LEVEL_BLOCK)
        expected["scales.codes"] = (first, scales, np.uint8)
        expected["scales.absmax"] = (q.scales.absmax, (groups,), np.float32)
        expected["scales.offset"] = (q.scales.offset, (), np.float32)
    else:
        expected["scales"] = (first, scales, np.float32)
    for field, (leaf, shape, dtype) in expected.items():
        if tuple(leaf.shape) != batch + shape or leaf.dtype != dtype:
            raise ValueError(
                f"{name}: {field} must be {np.dtype(dtype).name}{list(batch + shape)}, "
                f"got {leaf.dtype}{list(leaf.shape)}"
            )
