"""merge_lora and dequantize_model, for NNX models and for Linen parameter trees."""

from collections.abc import Mapping
from typing import Any, Literal, overload

import jax.numpy as jnp
from flax import nnx

from qjax.swap import nnx_merge
from qjax.swap.linen import dequantize_params, merge_lora_params, requantize_params
from qjax.swap.merge_error import MergeError


@overload
def merge_lora(
    x: Any, dtype: Any = ..., *, requantize: Literal[False] = ..., source: Any = ...
) -> Any: ...
@overload
def merge_lora(
    x: Any, dtype: Any = ..., *, requantize: Literal[True]
) -> tuple[Any, dict[str, MergeError]]: ...
def merge_lora(
    x: Any, dtype: Any = jnp.bfloat16, *, requantize: bool = False, source: Any = None
) -> Any:
    """Return x in floating point with its adapters merged: dequantize(W) + scaling * A B.

    The sum is taken in float32 and rounded once to `dtype`; with DoRA each column then takes its
    learned length. x itself stays as it is. Layers that were never quantized and have no adapter
    are not touched.

    Args:
        x: an NNX model, whose layers become Flax's own again, biases cast too; or the parameters
            of a Linen model.
        dtype: of the merged weights.
        requantize: merge into 4-bit weights instead, in each one's own format. That rounds again:
            the result is a pair, x and the `MergeError` of each weight with an adapter by path.
        source: for parameters of Linen, the float ones, or a function from the path of a kernel to
            its array: adapters are added to these in the place of the decoded weights.

    Raises:
        ValueError: in an NNX model nothing is quantized and nothing has an adapter; nothing has an
            adapter to requantize; a source that does not fit, or is not used.
        TypeError: neither.

    Example:
        >>> model = qjax.quantize_model(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
        >>> model = qjax.add_lora(model, qjax.LoraConfig(rank=4), rngs=nnx.Rngs(1))
        >>> merged = merge_lora(model)
        >>> type(merged).__name__, merged.kernel.dtype.name
        ('Linear', 'bfloat16')
        >>> merged, errors = merge_lora(model, requantize=True)
        >>> merged.kernel.q.format, list(errors)
        ('nf4', ['kernel'])
    """
    if source is not None and (requantize or isinstance(x, nnx.Module)):
        raise ValueError("source is for merging parameters of Linen in floating point")
    if isinstance(x, nnx.Module):
        return nnx_merge.requantize_lora(x) if requantize else nnx_merge.merge_lora(x, dtype)
    return requantize_params(_tree(x)) if requantize else merge_lora_params(_tree(x), dtype, source)


def dequantize_model(x: Any) -> Any:
    """Return x with its 4-bit weights decoded to the dtypes that they had; x stays as it is.

    Args:
        x: an NNX model, whose adapters stay, beside float weights; or the parameters of a Linen
            model, without adapters.

    Raises:
        ValueError: nothing is quantized in an NNX model, or a Linen kernel has an adapter.
        TypeError: neither.

    Example:
        >>> model = qjax.quantize_model(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
        >>> type(dequantize_model(model)).__name__
        'Linear'
    """
    if isinstance(x, nnx.Module):
        return nnx_merge.dequantize_model(x)
    return dequantize_params(_tree(x))


def _tree(x: Any) -> Mapping[str, Any]:
    if not isinstance(x, Mapping):
        raise TypeError(f"x must be an nnx.Module or a dict of parameters, got {type(x).__name__}")
    return x
