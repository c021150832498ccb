"""NNX models back in floating point: adapters merged, or weights decoded beside them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.core.blockwise import quantize_like
from qjax.nn.nnx_adapter import has_adapter, settle
from qjax.nn.nnx_param import quant_metadata
from qjax.swap.merge_error import MergeError, merge_error
from qjax.swap.nnx_find import Found
from qjax.swap.nnx_raw import find_weights


def merge_lora(model: nnx.Module, dtype: Any = jnp.bfloat16) -> nnx.Module:
    """Return a float copy of the model with its active adapter merged; the model keeps its own.

    Each layer becomes Flax's own again, with dequantize(W) + scaling * A B summed in float32 and
    rounded once to `dtype`; its bias is cast too. Layers that were never quantized and have no
    adapter stay as they are. Adapters that are not active are left out.

    Raises:
        ValueError: nothing is quantized and nothing has an adapter.
    """
    return _floated(model, dtype, merge=True)


def requantize_lora(model: nnx.Module) -> tuple[nnx.Module, dict[str, MergeError]]:
    """Return a copy with the active adapter merged into 4-bit weights, and what that cost.

    Only weights with an adapter are quantized again; those in floating point are merged in their
    own dtype, at no cost.

    Raises:
        ValueError: there is no adapter.
    """
    model = nnx.clone(model)
    adapted = [f for f in find_weights(model) if f.is_adapted]
    if not adapted and not any(has_adapter(module) for _, module in nnx.iter_modules(model)):
        raise ValueError(f"{type(model).__name__} has no adapter to merge")
    errors = {}
    for f in adapted:
        if not f.is_quantized:
            f.to_float(_param(f.merged(f.weight.dtype), f.weight), keep_adapter=False)
            continue
        old, merged = f.weight.get_raw_value(), f.merged(jnp.float32)
        new = quantize_like(merged, old, f.weight_path)
        errors[f.weight_path] = merge_error(old, merged, new)
        f.weight.set_value(new)
        f.drop_adapter()
    _settle(model)
    return model, errors


def dequantize_model(model: nnx.Module, dtype: Any = None) -> nnx.Module:
    """Return a copy of the model with float weights; adapters stay beside them.

    Args:
        model: with quantized layers; it keeps its own.
        dtype: of the weights; None for the dtypes that they had.

    Raises:
        ValueError: nothing is quantized.
    """
    return _floated(model, dtype, merge=False)


def _floated(model: nnx.Module, dtype: Any, merge: bool) -> nnx.Module:
    found = [f for f in find_weights(model) if f.is_quantized or (merge and f.is_adapted)]
    saved = merge and any(has_adapter(module) for _, module in nnx.iter_modules(model))
    if not found and not saved:
        raise ValueError(f"{type(model).__name__} has no layer in 4 bits")
    model = nnx.clone(model)  # new modules and variables, the same arrays
    paths = {f.weight_path for f in found}
    shared: dict[int, nnx.Param] = {}
    for f in find_weights(model):
        if f.weight_path not in paths:
            continue
        old = f.weight
        if merge and f.is_adapted:
            new = _param(f.merged(dtype), old)
        else:
            if id(old) not in shared:
                shared[id(old)] = _param(_decoded(old, dtype), old)
            new = shared[id(old)]
        f.to_float(new, keep_adapter=f.is_adapted and not merge)
        if merge and isinstance(f, Found) and f.layer.__dict__.get("bias") is not None:
            f.layer.bias.set_value(f.layer.bias[...].astype(dtype))
    if merge:
        _settle(model)
    return model


def _settle(model: nnx.Module) -> None:
    for _, module in list(nnx.iter_modules(model)):
        settle(module)


def _decoded(variable: nnx.Variable, dtype: Any) -> jax.Array:
    value = variable.get_raw_value()
    if isinstance(value.packed, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda q: q.dequantize(dtype), value)
    return value.dequantize(dtype)


def _param(w: Any, old: nnx.Variable) -> nnx.Param:
    """Return a float weight with the metadata of `old`; a named sharding asks for no mesh here."""
    return nnx.Param(w, **quant_metadata(old))
