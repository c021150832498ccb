"""calibrate: the weights of a model that is already in 4 bits, quantized again with more care."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.packing import pack
from pallas_kernels.scales import decode_scales
from qjax.calibration.awq import Folds, check_folds, fold, input_scales
from qjax.calibration.gptq import gptq_codes
from qjax.calibration.moments import Moments, observed_moments
from qjax.calibration.search import half_quadratic, nearest, squared_error
from qjax.core.blockwise import quantize_like
from qjax.core.double_quant import kernel_form, quantize_scales
from qjax.core.qtensor import QTensor
from qjax.nn.lora import ADAPTER_LEAVES
from qjax.nn.nnx_param import QuantParam
from qjax.swap.leaves import flatten_weights, iter_leaves

METHODS = ("mse", "hqq", "activation", "awq", "gptq")
_WITH_DATA = ("activation", "awq", "gptq")


def calibrate(
    x: Any,
    reference: Any,
    batches: Iterable[Any] = (),
    *,
    method: str = "gptq",
    call: Callable[..., Any] | None = None,
    folds: Folds | None = None,
    damping: float = 0.01,
) -> Any:
    """Quantize the 4-bit weights of a model again, so that its outputs err less.

    Formats, shapes and bytes stay, so every kernel and checkpoint takes the result. Without data:

    - "mse": the scale of each block with the least squared error.
    - "hqq": half-quadratic fit of the scales (Badri and Shaji 2023).

    With data:

    - "activation": as "mse", with errors weighted by the mean square of the activation that each
      weight meets.
    - "awq": inputs are scaled by a power of their size (Lin et al. 2023), where the norm or dense
      layer in front can take the inverse, and those parameters change too. Then as "activation".
    - "gptq": the scales of "activation", then codes that make up for each other's errors (Frantar
      et al. 2022).

    Weights that are not in a 4-bit format with absmax scales, or in the flat layout, stay as they
    are; those that "awq" scales are quantized again in any format.

    Args:
        x: the quantized NNX model (changed in place), or parameters of a Linen one.
        reference: the same in floating point: a model or tree with the same paths.
        batches: what the model is called with, one after the other; a tuple is several arguments.
        method: one of the above.
        call: for parameters, `call(params, *batch)`, such as
            `lambda params, ids: qjax.apply(module, {"params": params}, ids)`.
        folds: of "awq": the path of a norm or dense layer -> the paths of the weights that read its
            output, if nothing else does. The models of `qjax.models` know theirs.
        damping: of "gptq", relative to the mean of the diagonal.

    Returns:
        The model, or new parameters.

    Raises:
        ValueError: an unknown method, data that are missing, empty or not finite, no weight to
            calibrate, a reference without the float weight at a path, or folds that do not fit.

    Example:
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=rngs))
        >>> reference = nnx.clone(model)
        >>> data = [jax.random.normal(jax.random.key(i), (8, 64)) for i in range(2)]
        >>> model = qjax.calibrate(qjax.quantize_model(model), reference, data, method="gptq")
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    weights = {path: q for path, q, _ in iter_leaves(x) if isinstance(q, QTensor)}
    floats = {path: leaf for path, leaf, _ in iter_leaves(reference)}
    changing = {path for path, q in weights.items() if _can_improve(q)}
    folds = _folds(x, folds, method)
    check_folds(folds, weights, floats)
    changing |= weights.keys() & {f"{producer}/kernel" for producer in folds}
    changing |= weights.keys() & {path for readers in folds.values() for path in readers}
    if not changing:
        raise ValueError("there is no 4-bit weight with absmax scales in rows to calibrate")
    for path in changing:
        _check_float(path, weights[path], floats.get(path))
    moments = _observe(x, batches, call) if method in _WITH_DATA else Moments()
    scales = input_scales(weights, floats, moments, folds)
    inputs = {path: s for producer, s in scales.items() for path in folds[producer]}
    new: dict[str, Any] = fold(scales, weights, floats, folds, _offsets(x))
    for path in changing:
        q, w = weights[path], new.get(path, floats[path])
        if not _can_improve(q):
            new[path] = quantize_like(w, q, path)
            continue
        products: Any = moments.mean(path)[1] if method in _WITH_DATA else None
        if path in inputs:
            products = products / (inputs[path][:, None] * inputs[path][None])
        new[path] = _requantized(q, w, products, method, damping)
    return _replaced(x, new)


def _check_float(path: str, q: QTensor, w: Any) -> None:
    if isinstance(w, QTensor) or w is None or tuple(w.shape) != q.shape:
        found = "nothing" if w is None else f"{getattr(w, 'dtype', w)}{list(w.shape)}"
        raise ValueError(
            f"{path}: reference must have its float weight {list(q.shape)}, found {found}"
        )


def _folds(x: Any, folds: Folds | None, method: str) -> Folds:
    """Return what "awq" may scale, which the models of this library know; nothing otherwise."""
    if method != "awq":
        if folds is not None:
            raise ValueError(f'folds= is of method="awq", got method={method!r}')
        return {}
    folds = x.foldings() if folds is None and hasattr(x, "foldings") else folds
    if not folds:
        raise ValueError(
            'method="awq" needs folds=: path of a norm or dense layer -> paths of the weights that '
            "read its output"
        )
    if any(path.rpartition("/")[2] in ADAPTER_LEAVES for path, *_ in iter_leaves(x)):
        raise ValueError('method="awq" changes what layers get: calibrate before adding adapters')
    return folds


def _offsets(x: Any) -> dict[str, float]:
    """Return what norms add to their scale, by its path."""
    modules = nnx.iter_modules(x) if isinstance(x, nnx.Module) else ()
    offsets = {"/".join(map(str, (*p, "scale"))): getattr(m, "offset", None) for p, m in modules}
    return {path: offset for path, offset in offsets.items() if isinstance(offset, float)}


def _can_improve(q: QTensor) -> bool:
    return q.kind.bits == 4 and q.kind.scaling == "absmax" and q.layout == "rows"


def _observe(x: Any, batches: Iterable[Any], call: Callable[..., Any] | None) -> Moments:
    if isinstance(x, nnx.Module):
        model = nnx.clone(x)  # variables of its own, which may be told their paths
        for path, variable in nnx.to_flat_state(nnx.state(model, QuantParam)):
            variable.set_metadata(path="/".join(map(str, path)))
        return observed_moments((call and functools.partial(call, model)) or model, {}, batches)
    if call is None:
        raise ValueError("call must say how parameters are called: call(params, *batch)")
    names = {id(q.packed): path for path, q in flatten_weights(x) if isinstance(q, QTensor)}
    return observed_moments(functools.partial(call, x), names, batches)


@functools.partial(jax.jit, static_argnames=("method", "damping"))
def _requantized(q: QTensor, w: jax.Array, moment: jax.Array | None, method: str, damping: float):
    """Return w as a QTensor like q."""
    batch = len(q.batch_shape)
    order = [*range(batch), *(batch + axis for axis in (*q.out_axes, *q.contract_axes))]
    k = math.prod(q.contract_shape)
    rows = jnp.transpose(w, order).astype(jnp.float32).reshape(*q.batch_shape, -1, k)
    one = functools.partial(_slice, q=q, method=method, damping=damping)
    for _ in range(batch):
        one = jax.vmap(one)
    packed, scales = one(rows, jnp.zeros(q.batch_shape) if moment is None else moment)
    shaped = lambda a, like: a.reshape(like.shape)  # noqa: E731
    return dataclasses.replace(
        q, packed=shaped(packed, q.packed), scales=jax.tree.map(shaped, scales, q.scales)
    )


def _slice(rows: jax.Array, moment: jax.Array, *, q: QTensor, method: str, damping: float):
    table, block_size = q.codebook, q.block_size
    if method == "hqq":
        scales = half_quadratic(rows, table, block_size)
    else:
        importance = jnp.diagonal(moment) if method in _WITH_DATA else None
        scales = squared_error(rows, table, block_size, importance)
    stored: Any = scales
    if q.double_quant:  # codes are chosen for the scales as they will be read
        stored = quantize_scales(scales)
        scales = decode_scales(kernel_form(stored))
    if method == "gptq":
        codes = gptq_codes(rows, scales, moment, table, damping)
    else:
        blocks = rows.reshape(rows.shape[0], -1, block_size)
        codes = nearest(blocks, scales[..., None], table).reshape(rows.shape)
    return pack(codes), stored


def _replaced(x: Any, new: dict[str, Any]) -> Any:
    if isinstance(x, nnx.Module):
        for path, variable in nnx.to_flat_state(nnx.state(x)):
            name = "/".join(map(str, path))
            if name in new:
                variable.set_raw_value(new[name])
        return x
    ids = {id(leaf): new[path] for path, leaf in flatten_weights(x) if path in new}
    is_q = lambda leaf: isinstance(leaf, QTensor)  # noqa: E731
    return jax.tree.map(lambda leaf: ids.get(id(leaf), leaf), x, is_leaf=is_q)
