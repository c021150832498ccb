"""NNX models back in floating point: adapters merged, or weights decoded beside them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.nn.nnx_layer import LoraLayer
from qjax.nn.nnx_param import quant_metadata
from qjax.swap.nnx_find import Found, find_layers


def merge_lora(model: nnx.Module, dtype: Any = jnp.bfloat16) -> nnx.Module:
    """Return a float copy of the model with its adapters merged; the model keeps its own.

    Each layer becomes Flax's own again, with dequantize(W) + scaling * A B summed in float32 and
    rounded once to `dtype`; its bias is cast too. Layers that were never quantized and have no
    adapter stay as they are. To go back to 4 bits, which rounds again, call `quantize_model`.

    Raises:
        ValueError: nothing is quantized and nothing has an adapter.
    """
    return _floated(model, dtype, merge=True)


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
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer in 4 bits")
    model = nnx.clone(model)  # new modules and variables, the same arrays
    paths = {f.path for f in found}
    shared: dict[int, nnx.Param] = {}
    for f in list(find_layers(model)):
        if f.path not in paths:
            continue
        old, adapted = f.weight, _adapter(f.layer)
        if merge and adapted:
            new = nnx.Param(f.layer.float_weight(dtype), **quant_metadata(old))
        else:
            if id(old) not in shared:
                shared[id(old)] = nnx.Param(_decoded(old, dtype), **quant_metadata(old))
            new = shared[id(old)]
        _to_float(f, new, keep_adapter=adapted and not merge)
        if merge and getattr(f.layer, "bias", None) is not None:
            f.layer.bias.set_value(f.layer.bias[...].astype(dtype))
    return model


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
