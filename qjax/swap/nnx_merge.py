"""NNX models back in floating point: adapters merged, or weights decoded beside them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.core.blockwise import quantize_like
from qjax.nn.nnx_adapter import has_adapter, settle
from qjax.nn.nnx_layer import LoraLayer
from qjax.nn.nnx_param import float_metadata
from qjax.swap.merge_error import MergeError, merge_error
from qjax.swap.nnx_find import Found, find_layers


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
    if not any(has_adapter(module) for _, module in nnx.iter_modules(model)):
        raise ValueError(f"{type(model).__name__} has no adapter to merge")
    model = nnx.clone(model)
    errors = {}
    for f in list(find_layers(model)):
        if not _adapter(f.layer):
            continue
        if not f.is_quantized:
            _to_float(f, nnx.Param(f.layer.float_weight(), **float_metadata(f.weight)), False)
            continue
        old, merged = f.weight.get_raw_value(), f.layer.float_weight(jnp.float32)
        new = quantize_like(merged, old, f.weight_path)
        errors[f.weight_path] = merge_error(old, merged, new)
        f.weight.set_value(new)
        f.layer.drop_adapter()
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
    found = [f for f in find_layers(model) if f.is_quantized or (merge and _adapter(f.layer))]
    saved = merge and any(has_adapter(module) for _, module in nnx.iter_modules(model))
    if not found and not saved:
        raise ValueError(f"{type(model).__name__} has no layer in 4 bits")
    model = nnx.clone(model)  # new modules and variables, the same arrays
    paths = {f.path for f in found}
    shared: dict[int, nnx.Param] = {}
    for f in list(find_layers(model)):
        if f.path not in paths:
            continue
        old, adapted = f.weight, _adapter(f.layer)
        if merge and adapted:
            new = nnx.Param(f.layer.float_weight(dtype), **float_metadata(old))
        else:
            if id(old) not in shared:
                shared[id(old)] = nnx.Param(_decoded(old, dtype), **float_metadata(old))
            new = shared[id(old)]
        _to_float(f, new, keep_adapter=adapted and not merge)
        if merge and getattr(f.layer, "bias", None) is not None:
            f.layer.bias.set_value(f.layer.bias[...].astype(dtype))
    if merge:
        _settle(model)
    return model


def _settle(model: nnx.Module) -> None:
    for _, module in list(nnx.iter_modules(model)):
        settle(module)


def _adapter(layer: nnx.Module) -> bool:
    return isinstance(layer, LoraLayer) and layer.lora_a is not None


def _decoded(variable: nnx.Variable, dtype: Any) -> jax.Array:
    value = variable.get_raw_value()
    if isinstance(value.packed, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda q: q.dequantize(dtype), value)
    return value.dequantize(dtype)


def _to_float(f: Found, weight: nnx.Param, keep_adapter: bool) -> None:
    if "compute_dtype" in vars(f.layer):
        del f.layer.compute_dtype
    if isinstance(f.layer, LoraLayer):
        if not keep_adapter:
            f.layer.drop_adapter()
        f.layer.__class__ = f.cls.lora_class if keep_adapter else f.cls.float_class
    setattr(f.layer, f.cls.weight_name, weight)
