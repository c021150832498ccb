"""quantize: a float weight to a QTensor, slice by slice."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import quantize as quantize_rows
from pallas_kernels.packing import pack
from pallas_kernels.quantize.reference import SMALLEST_SCALE, encode, normalize, to_float32
from qjax.core.codebook import codebook
from qjax.core.concrete import is_concrete
from qjax.core.config import QuantConfig
from qjax.core.double_quant import quantize_scales
from qjax.core.encode import encode_rows
from qjax.core.formats import format_of
from qjax.core.qtensor import QTensor, layout_for

DEFAULT = QuantConfig()


def quantize(
    w: jax.Array,
    cfg: QuantConfig = DEFAULT,
    contract_axes: tuple[int, ...] = (0,),
    check_finite: bool = True,
    *,
    batch_ndim: int = 0,
    name: str = "w",
) -> QTensor:
    """Quantize a weight in blocks along its contract axes.

    Args:
        w: floating array; a Flax kernel is [in, out].
        cfg: format, block size and double quantization; its patterns are not used here.
        contract_axes: axes, counted in one slice, that a matmul sums over: blocks run along them.
        check_finite: refuse NaN and inf where they can be seen, that is outside `jit`.
        batch_ndim: leading axes of stacked weights, quantized one slice at a time.
        name: what to call `w` in errors, such as its path.

    Returns:
        A `QTensor` of w's shape and dtype.

    Raises:
        ValueError: axes out of range, an empty weight, NaN or inf, or blocks that do not tile K in
            a format that is not in scales of float32.
        TypeError: w is not a floating array.

    Example:
        >>> q = quantize(jnp.ones((128, 32)))
        >>> q.shape, q.packed.shape
        ((128, 32), (32, 64))

    Source: QLoRA (Dettmers et al. 2023), section 3; bytes equal bitsandbytes' CPU encoder.
    """
    if not hasattr(w, "dtype") or not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating array, got {getattr(w, 'dtype', type(w))}")
    if not 0 <= batch_ndim < max(w.ndim, 1):
        raise ValueError(f"{name}: batch_ndim={batch_ndim} must be below its rank {w.ndim}")
    axes = _contract_axes(contract_axes, w.ndim - batch_ndim, name)
    if w.size == 0:
        raise ValueError(f"{name} must not be empty, got shape {w.shape}")
    dtype = jnp.dtype(w.dtype)
    slice_shape = tuple(w.shape[batch_ndim:])
    k = math.prod(slice_shape[i] for i in axes)
    block_size = cfg.block_size or k
    layout = layout_for(k, block_size)
    if layout == "flat" and format_of(cfg.format).scaling != "absmax":
        raise ValueError(
            f"{name}: block_size={block_size} of {cfg.format!r} must divide K={k}; exclude it, or "
            "give it another format by overrides"
        )
    arrays = _quantize(w, cfg.format, block_size, cfg.double_quant, axes, batch_ndim)
    packed, scales, finite = arrays
    if check_finite and is_concrete(finite) and not finite:
        raise ValueError(f"{name} holds NaN or inf; check_finite=False quantizes it all the same")
    statics = slice_shape, dtype, cfg.format, block_size, axes, layout, cfg.int8_threshold
    return QTensor(packed, scales, *statics)


def _contract_axes(axes, ndim: int, name: str) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    normal = tuple(sorted(axis + ndim if axis < 0 else axis for axis in axes))
    if not axes or len(set(normal)) != len(axes) or not all(0 <= a < ndim for a in normal):
        raise ValueError(
            f"{name}: contract_axes={axes} must be distinct axes of a rank-{ndim} slice"
        )
    return normal


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _quantize(w, format, block_size, double_quant, contract_axes, batch_ndim):
    def one(w):
        return _quantize_slice(w, format, block_size, double_quant, contract_axes)

    if batch_ndim == 0:
        return one(w)
    batch = w.shape[:batch_ndim]
    # lax.map, not vmap: the temporaries are those of one slice.
    packed, scales, finite = jax.lax.map(one, w.reshape(-1, *w.shape[batch_ndim:]))
    packed, scales = jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), (packed, scales))
    return packed, scales, finite.all()


def _quantize_slice(w, format, block_size, double_quant, contract_axes):
    out_axes = [i for i in range(w.ndim) if i not in contract_axes]
    k = math.prod(w.shape[i] for i in contract_axes)
    rows = jnp.transpose(w, (*out_axes, *contract_axes)).reshape(-1, k)
    if layout_for(k, block_size) == "flat":
        packed, absmax = _quantize_line(rows.reshape(-1), codebook(format), block_size)
        return packed, quantize_scales(absmax) if double_quant else absmax, _finite(absmax)
    packed, scales, finite = encode_rows(rows, format_of(format), block_size)
    out_shape = [w.shape[i] for i in out_axes]
    shaped = lambda a: a.reshape(*out_shape, -1) if a.ndim else a  # noqa: E731
    packed, scales = jax.tree.map(shaped, (packed, scales))
    return packed, quantize_scales(scales) if double_quant else scales, finite


def _finite(absmax):
    return jnp.isfinite(absmax).all()


def _quantize_line(line, table: np.ndarray, block_size: int):
    """Quantize [size] in blocks, the last of which may be short."""
    full = line.size // block_size * block_size
    packed, absmax = quantize_rows(
        line[:full].reshape(-1, block_size), table, block_size=block_size
    )
    packed, absmax = packed.reshape(-1), absmax.reshape(-1)
    if full == line.size:
        return packed, absmax
    # In a short block bitsandbytes divides, and stores the guarded absmax.
    scaled, largest = normalize(to_float32(line[full:])[None], divide=True)
    scaled = jnp.pad(scaled[0], (0, scaled.size % 2))
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)  # as bits: both may be subnormal
    bits = jnp.maximum(bits, SMALLEST_SCALE.view(np.int32))
    guarded = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return (
        jnp.concatenate([packed, pack(encode(scaled, table))]),
        jnp.concatenate([absmax, guarded]),
    )
