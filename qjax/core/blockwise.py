"""quantize: a float weight to a QTensor, slice by slice."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import quantize as quantize_rows
from pallas_kernels.packing import pack
from pallas_kernels.quantize.reference import SMALLEST_SCALE, encode, normalize, to_float32
from qjax.core.codebook import codebook
from qjax.core.concrete import is_concrete
from qjax.core.config import QuantConfig, check_config
from qjax.core.double_quant import quantize_scales
from qjax.core.encode import encode_rows
from qjax.core.formats import format_of
from qjax.core.placement import on_mesh, place, sharding_of, weight_shardings
from qjax.core.qtensor import QTensor, array_shapes, layout_for
from qjax.core.scales import map_scales, scales_class

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

    On a mesh the codes and scales are sharded as w is; the second level of double quantization is
    on every device.

    Args:
        w: floating array, or a `jax.ShapeDtypeStruct`; a Flax kernel is [in, out].
        cfg: format, block size and double quantization; its patterns are not used here.
        contract_axes: axes, counted in one slice, that a matmul sums over: blocks run along them.
        check_finite: refuse NaN and inf where they can be seen, that is outside `jit`.
        batch_ndim: leading axes of stacked weights, quantized one slice at a time.
        name: what to call `w` in errors, such as its path.

    Returns:
        A `QTensor` of w's shape and dtype.

    Raises:
        ValueError: axes out of range, an empty weight, NaN or inf, a shard of w that would split
            a block, or blocks that do not tile K in a format that is not in scales of float32.
        TypeError: w is not a floating array, or cfg no QuantConfig.

    Example:
        >>> q = quantize(jnp.ones((128, 32)))
        >>> q.shape, q.packed.shape
        ((128, 32), (32, 64))

    Source: QLoRA (Dettmers et al. 2023), section 3; bytes of NF4, FP4 and int8 equal those of
    bitsandbytes' CPU encoder, int8 but for ties on a GPU, where XLA's division is not exact.
    """
    if not hasattr(w, "dtype") or not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating array, got {getattr(w, 'dtype', type(w))}")
    check_config(cfg, QuantConfig)
    if not 0 <= batch_ndim < max(w.ndim, 1):
        raise ValueError(f"{name}: batch_ndim={batch_ndim} must be below its rank {w.ndim}")
    axes = _contract_axes(contract_axes, w.ndim - batch_ndim, name)
    if w.size == 0:
        raise ValueError(f"{name} must not be empty, got shape {w.shape}")
    statics = _statics(w, cfg, axes, batch_ndim, name)
    options = cfg.format, statics[3], cfg.double_quant, axes, batch_ndim
    sharding, placed = sharding_of(w), None
    if sharding is not None:
        placed = weight_shardings(_abstract(w, cfg, statics, batch_ndim), sharding, name)
    if isinstance(w, jax.ShapeDtypeStruct):
        bare = jax.ShapeDtypeStruct(w.shape, w.dtype)
        packed, scales, _ = jax.eval_shape(lambda w: _quantize(w, *options), bare)
        q = QTensor(packed, scales, *statics)
        return q if placed is None else place(q, placed)
    packed, scales, finite = _quantize(w, *options, placed)
    if check_finite and is_concrete(finite) and not finite:
        raise ValueError(f"{name} holds NaN or inf; check_finite=False quantizes it all the same")
    return QTensor(packed, scales, *statics)


def _statics(w, cfg, axes, batch_ndim, name) -> tuple:
    """Return the static fields of the QTensor."""
    slice_shape = tuple(w.shape[batch_ndim:])
    k = math.prod(slice_shape[i] for i in axes)
    block_size = cfg.block_size or k
    layout = layout_for(k, block_size)
    if layout == "flat" and format_of(cfg.format).scaling != "absmax":
        raise ValueError(
            f"{name}: block_size={block_size} of {cfg.format!r} must divide K={k}; exclude it, or "
            "give it another format by overrides"
        )
    dtype = jnp.dtype(w.dtype)
    return slice_shape, dtype, cfg.format, block_size, axes, layout, cfg.int8_threshold


def _abstract(w, cfg, statics, batch_ndim) -> QTensor:
    """Return a QTensor that knows its batch axes and which arrays it has."""
    absent: Any = None
    cls = scales_class(format_of(cfg.format), cfg.double_quant)
    q = QTensor(absent, map_scales(cls, absent, absent, absent), *statics)
    shape = (*w.shape[:batch_ndim], *array_shapes(q)[0])
    return dataclasses.replace(q, packed=jax.ShapeDtypeStruct(shape, q.kind.code_dtype))


def quantize_like(w: jax.Array, q: QTensor, name: str = "w") -> QTensor:
    """Quantize w, of any floating dtype, in the format, blocks and logical dtype of q."""
    batch_ndim = w.ndim - len(q.slice_shape)
    new = quantize(w, q.config, q.contract_axes, batch_ndim=batch_ndim, name=name)
    return dataclasses.replace(new, dtype=q.dtype)


def _contract_axes(axes, ndim: int, name: str) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    normal = tuple(sorted(axis + ndim if axis < 0 else axis for axis in axes))
    if not axes or len(set(normal)) != len(axes) or not all(0 <= a < ndim for a in normal):
        raise ValueError(
            f"{name}: contract_axes={axes} must be distinct axes of a rank-{ndim} slice"
        )
    return normal


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6))
def _quantize(w, format, block_size, double_quant, contract_axes, batch_ndim, placed=None):
    def first_level(w):
        one = functools.partial(_quantize_slice, format, block_size, contract_axes)
        packed, scales, finite = _map_slices(one, batch_ndim, w)
        return packed, scales, finite.all()

    if placed is None:
        packed, scales, finite = first_level(w)
    else:
        # The whole of the scales on every device: a mean that is summed in parts differs in its
        # last bits, and the codes of double quantization with it.
        everywhere = NamedSharding(placed.packed.mesh, PartitionSpec())
        whole = jax.tree.map(lambda _: everywhere, placed.packed if double_quant else placed.scales)
        packed, scales, finite = on_mesh(first_level, (placed.packed, whole, everywhere), w)
    if double_quant:
        second_level = functools.partial(_map_slices, quantize_scales, batch_ndim)
        if placed is None:
            scales = second_level(scales)
        else:
            whole = jax.tree.map(lambda _: everywhere, placed.scales)
            scales = on_mesh(second_level, whole, scales)
    return packed, scales if placed is None else place(scales, placed.scales), finite


def _map_slices(function, batch_ndim: int, a):
    """Apply a function to each slice of [*batch, *slice]: its temporaries are those of one."""
    if batch_ndim == 0:
        return function(a)
    batch = a.shape[:batch_ndim]
    results = jax.lax.map(function, a.reshape(-1, *a.shape[batch_ndim:]))
    return jax.tree.map(lambda r: r.reshape(*batch, *r.shape[1:]), results)


def _quantize_slice(format, block_size, contract_axes, w):
    out_axes = [i for i in range(w.ndim) if i not in contract_axes]
    k = math.prod(w.shape[i] for i in contract_axes)
    rows = jnp.transpose(w, (*out_axes, *contract_axes)).reshape(-1, k)
    if layout_for(k, block_size) == "flat":
        packed, absmax = _quantize_line(rows.reshape(-1), codebook(format), block_size)
        return packed, absmax, jnp.isfinite(absmax).all()
    packed, scales, finite = encode_rows(rows, format_of(format), block_size)
    out_shape = [w.shape[i] for i in out_axes]
    shaped = lambda a: a.reshape(*out_shape, -1) if a.ndim else a  # noqa: E731
    packed, scales = jax.tree.map(shaped, (packed, scales))
    return packed, scales, finite


def _quantize_line(line, table: np.ndarray, block_size: int):
    """Quantize [size] in blocks, the last of which may be short."""
    full = line.size // block_size * block_size
    packed, absmax = jnp.zeros(0, jnp.uint8), jnp.zeros(0, jnp.float32)
    if full:
        blocks = line[:full].reshape(-1, block_size)
        encoded = quantize_rows(blocks, table, block_size=block_size)
        packed, absmax = (a.reshape(-1) for a in encoded)
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
