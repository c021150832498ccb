"""A linear layer in a step of generation, with what stands before it and what it is added to.

A step has one token a row: short kernels, of which it is the number that counts. Where a GPU's
kernels can, a norm or a gate and the product with A of the layer's adapter are one, and the product
with the weight, that with B and the sum with the stream another; elsewhere the layer is called.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import adapted_matmul, prepare_input
from pallas_kernels.dispatch import resolve, target
from qjax.core.qslice import ArraySlice, QSlice
from qjax.models.norm import RMSNorm
from qjax.nn.nnx_linear import QuantLinear
from qjax.ops import trace
from qjax.ops.lora import FEW_ROWS
from qjax.ops.matmul import kernel_weight


class Gated(NamedTuple):
    """activation(gate) * up of a joint projection to both."""

    activation: Callable[[jax.Array], jax.Array]

    def __call__(self, gate_up: jax.Array) -> jax.Array:
        """Map [..., 2 inner] to [..., inner]."""
        gate, up = jnp.split(gate_up, 2, axis=-1)
        return self.activation(gate) * up


def is_step(x: jax.Array, cache: Any) -> bool:
    """Whether x [B, T, ...] is of a step of generation, with few rows, on a GPU."""
    return cache is not None and x.shape[1] == 1 and len(x) <= FEW_ROWS and target().is_cuda


def linear(
    layer: Any,
    x: jax.Array,
    *,
    before: Callable[[jax.Array], jax.Array] | None = None,
    residual: jax.Array | None = None,
    step: bool = False,
    hidden: jax.Array | None = None,
) -> jax.Array:
    """Return residual + layer(before(x)) for x [B, T, K].

    Args:
        before: a norm, a `Gated`, or None.
        residual: of the result's shape, or None.
        step: see `is_step`.
        hidden: the product of x with what `adapter_ahead` gave for the layer, [B * T, R], or None.
    """
    out = _by_kernels(layer, x, before, residual, hidden) if step else None
    if out is not None:
        return out
    y = layer(x if before is None else before(x))
    return y if residual is None else residual + y


def adapter_ahead(layer: Any, x: jax.ShapeDtypeStruct) -> tuple[jax.Array, float] | None:
    """Return A of a layer's adapter and its factor, for a kernel that makes the layer's input x.

    None where there is no adapter, or `linear` would not take `hidden` for such an x [M, K].
    """
    product = _product(layer, x, None)
    if product is None or product.a is None or not product.is_kernel(x, product.hidden(x.shape[0])):
        return None
    return product.a, product.factor


class _Product(NamedTuple):
    """A layer as `adapted_matmul` takes it.

    Attributes:
        arrays, how: of the weight, and the options.
        a, b, factor: of the adapter, transposed, or None, None and 1.
    """

    arrays: tuple
    how: dict[str, Any]
    a: Any
    b: Any
    factor: float

    def hidden(self, rows: int) -> jax.ShapeDtypeStruct:
        """Shape of the product of the input with A."""
        return jax.ShapeDtypeStruct((rows, self.a.shape[-2]), self.a.dtype)

    def operands(self, x, hidden, residual=None) -> tuple:
        """What `adapted_matmul` takes."""
        return x, *self.arrays, None if hidden is None else (hidden, self.b), residual

    def is_kernel(self, x, hidden, residual=None) -> bool:
        """Whether a kernel does it."""
        return has_kernel("adapted_matmul", *self.operands(x, hidden, residual), **self.how)


def _product(layer: Any, x: Any, before: Any) -> _Product | None:
    weight = kernel_weight(layer.kernel.q) if _is_plain(layer, x) else None
    if weight is None or not _stacked_alike(layer, before):
        return None
    arrays, how = weight
    how["sections"] = layer.sections or (layer.out_features,)
    if layer.lora_a is None:
        return _Product(arrays, how, None, None, 1.0)
    ab = _whole(layer.lora_a), _whole(layer.lora_b)
    return _Product(arrays, how, *ab, layer.lora_config.scaling)


def _by_kernels(
    layer: Any, x: jax.Array, before: Any, residual: Any, hidden: jax.Array | None
) -> jax.Array | None:
    """The same by `prepare_input` and `adapted_matmul`, or None where they have no kernel."""
    product = _product(layer, x, before)
    if product is None:
        return None
    scale, a = None, product.a if hidden is None else None
    first: dict[str, Any] = {"kind": "plain", "epsilon": 0.0, "offset": 0.0}
    first |= {"factor": product.factor, "layer": product.how["layer"]}
    if isinstance(before, RMSNorm) and before.dtype == x.dtype:
        scale = _whole(before.scale)
        first |= {"kind": "rms_norm", "epsilon": before.epsilon, "offset": before.offset}
    elif isinstance(before, Gated) and before.activation is jax.nn.silu and a is not None:
        first["kind"] = "silu_gate"
    elif before is not None:
        x = before(x)
    x, lead = x.reshape(-1, x.shape[-1]), x.shape[:-1]
    residual = None if residual is None else residual.reshape(len(x), -1)
    y, made = jax.eval_shape(functools.partial(prepare_input, **first), x, a, scale)
    known = has_kernel("prepare_input", x, a, scale, **first)
    if not known or not product.is_kernel(y, made if hidden is None else hidden, residual):
        return None
    y, made = prepare_input(x, a, scale, **first)
    operands: Any = product.operands(y, made if hidden is None else hidden, residual)
    return adapted_matmul(*operands, **product.how).reshape(*lead, -1)


def _is_plain(layer: Any, x: jax.Array) -> bool:
    """Whether the kernels do what the layer does: no bias, DoRA, dropout, or other dtype."""
    if type(layer) is not QuantLinear or layer.bias is not None or trace.is_watched():
        return False
    if layer.lora_a is not None:
        dropout = layer.lora_dropout
        dropped = dropout is not None and not dropout.deterministic
        if dropped or layer.lora_magnitude is not None or not layer.lora_by_columns:
            return False
        if not layer.lora_a.dtype == layer.lora_b.dtype == x.dtype:
            return False
    return layer.product_dtype == x.dtype == layer.result_dtype(jnp.zeros((), x.dtype))


def _stacked_alike(layer: QuantLinear, before: Any) -> bool:
    """Whether all arrays are slices of stacks by one index, or none is."""
    variables = [layer.lora_a, layer.lora_b, before.scale if isinstance(before, RMSNorm) else None]
    stacked = isinstance(layer.kernel.q, QSlice)
    values = (v.get_raw_value() for v in variables if v is not None)
    return all(isinstance(value, ArraySlice) == stacked for value in values)


def _whole(variable: Any) -> jax.Array:
    """The array of a variable, or the stack of which it is a slice."""
    value = variable.get_raw_value()
    return value.stack if isinstance(value, ArraySlice) else value


def has_kernel(op: str, *args: Any, **options: Any) -> bool:
    """Whether an operation of `pallas_kernels` has more than XLA for these arguments."""
    return resolve(op, None, *args, **options).implementation != "xla"
