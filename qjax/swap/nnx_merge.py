"""NNX models back in floating point: adapters merged, or weights decoded beside them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.nn.nnx_param import quant_metadata
from qjax.swap.nnx_find import Found
from qjax.swap.nnx_raw import find_weights


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
    found = [f for f in find_weights(model) if f.is_quantized or (merge and f.is_adapted)]
    if not found:
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
    return model


def _decoded(variable: nnx.Variable, dtype: Any) -> jax.Array:
    value = variable.get_raw_value()
    if isinstance(value.packed, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda q: q.dequantize(dtype), value)
    return value.dequantize(dtype)


def _param(w: Any, old: nnx.Variable) -> nnx.Param:
    """Return a float weight with the metadata of `old`; a named sharding asks for no mesh here."""
    return nnx.Param(w, **quant_metadata(old))
