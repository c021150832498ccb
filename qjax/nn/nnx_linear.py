"""nnx.Linear and nnx.LinearGeneral with adapters, and in 4 bits."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.core.config import QuantConfig
from qjax.nn.equation import WeightAxes
from qjax.nn.lora import LoraConfig
from qjax.nn.nnx_layer import DEFAULT, LoraLayer, QuantLayer, finish
from qjax.ops.lora import lora_matmul
from qjax.ops.matmul import matmul


class LoraLinear(LoraLayer, nnx.Linear):
    """`nnx.Linear` with an adapter beside its float kernel; made by `qjax.add_lora`."""

    float_class = nnx.Linear
    lora_by_columns: bool = False  # A is transposed: within `generate`, see `lora_matmul`

    def weight_axes(self) -> WeightAxes:
        """See `LoraLayer`."""
        return WeightAxes((self.in_features, self.out_features), 0, (0,))

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        """Apply the layer to [..., in_features]."""
        y = self._base(inputs, out_sharding)
        layout = {"sections": self.sections, "by_columns": self.lora_by_columns}
        product = functools.partial(lora_matmul, **layout)
        base = lambda x: self._base(x, out_sharding)  # noqa: E731
        return self._adapt(y, inputs, product, lambda v: _spread(v, y.ndim), base)

    def _base(self, inputs, out_sharding):
        return nnx.Linear.__call__(self, inputs, out_sharding=out_sharding)


class QuantLinear(QuantLayer, LoraLinear):
    """`nnx.Linear` whose kernel [in_features, out_features] is a frozen 4-bit weight.

    Takes every argument of `nnx.Linear` but `dot_general`, and:

    Args:
        config: format, block size, double quantization and compute dtype.
        lora: adds an adapter.

    Raises:
        ValueError: `dot_general` is given.

    Example:
        >>> layer = QuantLinear(64, 8, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 64))).shape
        (2, 8)
    """

    lora_class = LoraLinear
    unsupported = ("dot_general",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        config: QuantConfig = DEFAULT,
        lora: LoraConfig | None = None,
        rngs: nnx.Rngs,
        **kwargs,
    ):
        self._refuse(kwargs)
        super().__init__(in_features, out_features, rngs=rngs, **kwargs)
        self._init_quantized(config, lora, rngs)

    def _base(self, inputs, out_sharding):
        bias = None if self.bias is None else self.bias[...]
        x, bias, dtype = self._promote(inputs, bias)
        y = self._multiply(matmul, x.astype(self.product_dtype), self._weight)
        bias = None if bias is None else _spread(bias, y.ndim)
        return finish(y, bias, dtype, out_sharding)


class LoraLinearGeneral(LoraLayer, nnx.LinearGeneral):
    """`nnx.LinearGeneral` with an adapter beside its float kernel; made by `qjax.add_lora`."""

    float_class = nnx.LinearGeneral

    def weight_axes(self) -> WeightAxes:
        """See `LoraLayer`."""
        batch = tuple(self.batch_axis.values())
        contract = tuple(range(len(self.in_features)))
        return WeightAxes((*batch, *self.in_features, *self.out_features), len(batch), contract)

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        """Apply the layer to the axes `axis` of the inputs; the new axes come last."""
        y, batch_ndim = self._base(inputs, out_sharding), len(self.batch_axis)
        base = lambda x: self._base(x, out_sharding)  # noqa: E731
        return self._adapt(
            y, inputs, self._lora_product, lambda v: _spread(v, y.ndim, batch_ndim), base
        )

    def _base(self, inputs, out_sharding):
        return nnx.LinearGeneral.__call__(self, inputs, out_sharding=out_sharding)

    def _lora_product(self, x, a, b):
        return lora_matmul(self._rows(x), a, b, len(self.batch_axis))

    def _rows(self, x: jax.Array) -> jax.Array:
        """Bring the inputs to [*batch, *rest, K].

        As Flax does, `axis` pairs with in_features in ascending order.
        """
        axis = sorted(i % x.ndim for i in self.axis)
        kept = [i for i in range(x.ndim) if i not in axis]
        sizes = tuple(x.shape[i] for i in axis)
        if sizes != self.in_features:
            raise ValueError(
                f"axes {self.axis} of the inputs {x.shape} must be in_features={self.in_features}"
            )
        shape = [x.shape[i] for i in kept]
        return jnp.transpose(x, (*kept, *axis)).reshape(*shape, math.prod(sizes))


class QuantLinearGeneral(QuantLayer, LoraLinearGeneral):
    """`nnx.LinearGeneral` whose kernel [*batch, *in_features, *out_features] is 4-bit.

    Blocks run along all of in_features, flattened. Takes every argument of `nnx.LinearGeneral` but
    `dot_general` and `dot_general_cls`, and `config` and `lora` as `QuantLinear` does.

    Raises:
        ValueError: `dot_general` or `dot_general_cls` is given.

    Example:
        >>> layer = QuantLinearGeneral((4, 32), 8, axis=(-2, -1), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 4, 32))).shape
        (2, 8)
    """

    lora_class = LoraLinearGeneral
    unsupported = ("dot_general", "dot_general_cls")

    def __init__(
        self,
        in_features,
        out_features,
        *,
        config: QuantConfig = DEFAULT,
        lora: LoraConfig | None = None,
        rngs: nnx.Rngs,
        **kwargs,
    ):
        self._refuse(kwargs)
        super().__init__(in_features, out_features, rngs=rngs, **kwargs)
        self._init_quantized(config, lora, rngs)

    def _base(self, inputs, out_sharding):
        bias = None if self.bias is None else self.bias[...]
        x, bias, dtype = self._promote(inputs, bias)
        rows = self._rows(x)
        y = self._multiply(matmul, rows.astype(self.product_dtype), self._weight)
        bias = None if bias is None else _spread(bias, y.ndim, len(self.batch_axis))
        return finish(y, bias, dtype, out_sharding)


def _spread(v: jax.Array, ndim: int, batch_ndim: int = 0) -> jax.Array:
    """Reshape [*batch, *out] to broadcast against [*batch, ..., *out] of rank `ndim`."""
    batch, out = v.shape[:batch_ndim], v.shape[batch_ndim:]
    return v.reshape(*batch, *(1,) * (ndim - v.ndim), *out)
