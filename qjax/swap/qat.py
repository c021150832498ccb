"""Quantization-aware training: weights rounded in the forward pass, trained as if they were not."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.core.blockwise import quantize
from qjax.core.config import QuantConfig
from qjax.core.qtensor import QTensor
from qjax.swap.leaves import flatten_weights, path_string
from qjax.swap.linen import quantize_params
from qjax.swap.nnx import quantize_model
from qjax.swap.nnx_find import Found
from qjax.swap.nnx_raw import Raw, find_weights


def fake_quantize(w: jax.Array, like: QTensor, name: str = "w") -> jax.Array:
    """Return w rounded to a quantized format, its gradient passed straight through.

    Args:
        w: floating.
        like: a QTensor of w's shape, abstract or not: format, axes and blocks are taken from it.
        name: what to call w in errors.

    Source: the straight-through estimator, Bengio et al. 2013, section 4.
    """
    value = jax.lax.stop_gradient(w)
    batch_ndim = len(like.batch_shape)
    q = quantize(
        value, like.config, like.contract_axes, check_finite=False, batch_ndim=batch_ndim, name=name
    )
    return w + (q.dequantize(w.dtype) - value)


def fake_quantize_params(params: Any, cfg: QuantConfig) -> Any:
    """Round the kernels of a Linen tree as `quantize_params` would, gradients straight through.

    Call it on the parameters inside the loss; they stay in floating point, and the optimizer
    trains them. To train adapters of a 4-bit tree, round what `merge_lora(tree, source=params)`
    gives: their sum with the float kernels.

    Args:
        params: a tree of floats; traced ones are as good.
        cfg: which kernels and how.

    Returns:
        The same tree, of floats.

    Example:
        >>> params = {"dense": {"kernel": jnp.linspace(0, 1, 128).reshape(64, 2)}}
        >>> rounded = qjax.fake_quantize_params(params, qjax.QuantConfig())
        >>> rounded["dense"]["kernel"].shape
        (64, 2)
    """
    plan = jax.eval_shape(lambda p: quantize_params(p, cfg), params)
    likes = {path: q for path, q in flatten_weights(plan) if isinstance(q, QTensor)}

    def rounded(path, leaf):
        name = path_string(path)
        return fake_quantize(leaf, likes[name], name) if name in likes else leaf

    return jax.tree_util.tree_map_with_path(rounded, params)


@contextlib.contextmanager
def fake_quantized(model: nnx.Module, cfg: QuantConfig) -> Iterator[None]:
    """Inside, the float weights that `quantize_model` would quantize are rounded to `cfg`'s format.

    Gradients pass straight through, to the weights or, where a layer has an adapter, to that: the
    sum of both is what is rounded. Use it inside the loss, under `nnx.grad` and `nnx.jit` too.

    Args:
        model: in floating point, adapters or not.
        cfg: which weights and how.

    Raises:
        ValueError: the model has no dense layer in floating point.

    Example:
        >>> model = nnx.Linear(64, 2, rngs=nnx.Rngs(0))
        >>> def loss_fn(model, x):
        ...     with qjax.fake_quantized(model, qjax.QuantConfig()):
        ...         return (model(x) ** 2).mean()
        >>> nnx.grad(loss_fn)(model, jnp.ones((1, 64)))["kernel"].shape
        (64, 2)
    """
    plan = _plan(model, cfg)
    found = [f for f in find_weights(model) if f.weight_path in plan and not f.is_quantized]
    if not found:
        raise ValueError(f"{type(model).__name__} has no dense layer in floating point to round")
    before = [(f.weight, f.weight.get_raw_value()) for f in found]
    try:
        for f in found:
            w, like = f.weight.get_raw_value(), plan[f.weight_path]
            f.weight.set_raw_value(_rounded(f, w, like))
        yield
    finally:
        for weight, value in before:
            weight.set_raw_value(value)


def _plan(model: nnx.Module, cfg: QuantConfig) -> dict[str, QTensor]:
    """Return what each weight would become, abstractly, by path."""
    graphdef, state = nnx.split(model)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
    with warnings.catch_warnings(action="ignore"):  # of how the 4-bit model would run
        quantized = quantize_model(nnx.merge(graphdef, abstract), cfg)
    weights = {f.weight_path: f.weight.get_raw_value() for f in find_weights(quantized)}
    return {path: q for path, q in weights.items() if isinstance(q, QTensor)}


def _rounded(f: Found | Raw, w: jax.Array, like: QTensor) -> jax.Array:
    name = f.weight_path
    if not f.is_adapted:
        return fake_quantize(w, like, name)
    # The layer adds the adapter's product itself: what is left of the rounded sum is the weight.
    base = jax.lax.stop_gradient(w).astype(jnp.float32)
    merged = f.merged(jnp.float32)
    adapter = merged - w.astype(jnp.float32)
    return (fake_quantize(base + adapter, like, name) - adapter).astype(w.dtype)
