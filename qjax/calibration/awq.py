"""AWQ (Lin et al. 2023): inputs that are large get weights that are large, and so precise.

A layer computes the same when input i is divided by s[i] and row i of its weight [in, out] is
multiplied by it. Scales s > 1 let a row use more of its blocks' range, so that its rounding errs
less against the others'. The division is folded into the norm or dense layer that makes the
input: the model has the parameters it had, of other values.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration.moments import Moments
from qjax.core.blockwise import quantize_like
from qjax.core.qtensor import QTensor

Folds = Mapping[str, Sequence[str]]
Arrays = dict[str, jax.Array]
_GRID = np.arange(20, dtype=np.float32) / 20  # exponents that are tried, as in AWQ's own search
_SMALLEST = np.float32(1e-4)
_PRODUCER = ("scale", "bias", "kernel")  # parameters of norms and dense layers


def check_folds(
    folds: Folds, weights: Mapping[str, QTensor], floats: Mapping[str, jax.Array]
) -> None:
    """Raise ValueError unless each producer's outputs are as many as its readers' inputs.

    Args:
        folds: path of a norm or dense layer -> paths of the weights that alone read its output.
        weights: the quantized weights of the model, by path.
        floats: its parameters in floating point.
    """
    every = [path for readers in folds.values() for path in readers]
    if twice := sorted({path for path in every if every.count(path) > 1}):
        raise ValueError(f"folds: {twice[0]} reads the output of one layer, and is named twice")
    for producer, readers in folds.items():
        own = [f"{producer}/{name}" for name in _PRODUCER if f"{producer}/{name}" in floats]
        if not any(path.endswith(("/scale", "/kernel")) for path in own):
            raise ValueError(f"folds: there is no norm and no dense layer at {producer!r}")
        if missing := [path for path in readers if path not in floats]:
            raise ValueError(f"folds[{producer!r}]: there is no weight at {missing[0]!r}")
        for path in (*own, *readers):
            if path in weights and weights[path].batch_shape:
                raise ValueError(f"folds[{producer!r}]: {path} is stacked; AWQ takes single layers")
        sizes = {path: _outputs(weights.get(path), floats[path]) for path in own}
        sizes |= {path: _inputs(weights.get(path), floats[path]) for path in readers}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"folds[{producer!r}]: outputs and inputs differ: {sizes}")


def _inputs(q: QTensor | None, w: jax.Array) -> int:
    return w.shape[0] if q is None else math.prod(q.contract_shape)


def _outputs(q: QTensor | None, w: jax.Array) -> int:
    return w.shape[-1] if q is None else math.prod(q.out_shape)


def input_scales(
    weights: Mapping[str, QTensor], floats: Mapping[str, jax.Array], moments: Moments, folds: Folds
) -> Arrays:
    """Return for each producer the scales s [K] by which its readers' outputs err least.

    s is the mean size of each input to a power; the powers 0 to 0.95 are tried with plain
    quantization, and the mean squared errors of all readers' outputs added up. A producer without a
    4-bit reader has none.

    Args:
        weights: the quantized weights.
        floats: the float ones.
        moments: of their inputs.
        folds: producer -> its readers.

    Source: AWQ, section 3.2, equation 5, a layer's outputs in the place of a block's.
    """
    found = {}
    for producer, readers in folds.items():
        packed = [path for path in readers if path in weights and weights[path].kind.bits == 4]
        if not packed:
            continue
        sizes = moments.mean(packed[0])[0]
        errors = [_errors(floats[p], weights[p], *moments.mean(p)) for p in packed]
        best = int(np.argmin(np.sum(errors, axis=0)))
        found[producer] = _scales(sizes, _GRID[best])
    return found


@jax.jit
def _scales(sizes: jax.Array, power: jax.Array) -> jax.Array:
    scales = jnp.maximum(sizes**power, _SMALLEST)
    return scales / jnp.sqrt(scales.max() * scales.min())


@jax.jit
def _errors(w: jax.Array, q: QTensor, sizes: jax.Array, products: jax.Array) -> jax.Array:
    """Return the mean squared error of the outputs, summed over them, for each power."""

    def error(power):
        scales = _along(q.contract_axes, _scales(sizes, power), q)
        lost = quantize_like(w * scales, q).dequantize(jnp.float32) / scales - w
        order = (*q.contract_axes, *q.out_axes)
        lost = jnp.transpose(lost, order).reshape(len(sizes), -1)
        return jnp.sum(lost * (products @ lost))

    w = w.astype(jnp.float32)
    return jax.lax.map(error, jnp.asarray(_GRID))


def _along(axes: tuple[int, ...], scales: jax.Array, q: QTensor) -> jax.Array:
    return scales.reshape([n if i in axes else 1 for i, n in enumerate(q.slice_shape)])


def fold(
    scales: Arrays,
    weights: Mapping[str, QTensor],
    floats: Mapping[str, jax.Array],
    folds: Folds,
    offsets: Mapping[str, float],
) -> Arrays:
    """Return the float parameters that change: the same function, with other weights.

    Args:
        scales, weights, floats, folds: as in, and from, `input_scales`.
        offsets: path of a norm's scale -> what the norm adds to it (1 in Gemma's).
    """
    new: Arrays = {}

    def current(path):
        return new[path] if path in new else jnp.asarray(floats[path])

    for producer, s in scales.items():
        for path in folds[producer]:
            w, q = current(path), weights.get(path)
            # A kernel that stays in floating point is [in, ...].
            along = (
                s.reshape(-1, *[1] * (w.ndim - 1)) if q is None else _along(q.contract_axes, s, q)
            )
            new[path] = (w * along).astype(w.dtype)
        for name in _PRODUCER:
            path = f"{producer}/{name}"
            if path not in floats:
                continue
            value, q, offset = current(path), weights.get(path), offsets.get(path, 0.0)
            along = (
                s.reshape(*[1] * (value.ndim - 1), -1) if q is None else _along(q.out_axes, s, q)
            )
            new[path] = ((value + offset) / along - offset).astype(value.dtype)
    return new
