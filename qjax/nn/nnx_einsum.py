"""nnx.Einsum with an adapter, and in 4 bits."""

import functools

import jax
from flax import nnx

from qjax.core.config import QuantConfig
from qjax.nn.equation import WeightAxes, equation_axes
from qjax.nn.lora import LoraConfig
from qjax.nn.nnx_layer import DEFAULT, LoraLayer, QuantLayer, finish
from qjax.ops.lora import lora_einsum
from qjax.ops.matmul import einsum, parse


class LoraEinsum(LoraLayer, nnx.Einsum):
    """`nnx.Einsum` with an adapter beside its float kernel; made by `qjax.add_lora`."""

    float_class = nnx.Einsum

    def weight_axes(self) -> WeightAxes:
        """See `LoraLayer`. Leading kernel axes that x and the result share are batch axes.

        Raises:
            ValueError: no equation in the constructor, or one that sums over no kernel axis.
        """
        if self.einsum_str is None:
            raise ValueError("an Einsum without einsum_str has no axes to quantize along")
        return equation_axes(self.einsum_str, tuple(self.kernel_shape))

    def __call__(self, inputs: jax.Array, einsum_str: str | None = None, out_sharding=None):
        """Apply the equation, the constructor's unless one is given here."""
        y = self._base(inputs, einsum_str, out_sharding)
        product = functools.partial(self._lora_product, einsum_str or self.einsum_str)
        return self._adapt(y, inputs, product)

    def _base(self, inputs, einsum_str, out_sharding):
        return nnx.Einsum.__call__(self, inputs, einsum_str, out_sharding=out_sharding)

    def _lora_product(self, equation, x, a, b):
        axes = self.weight_axes()
        return lora_einsum(equation, x, a, b, axes.contract_axes, axes.batch_ndim)


class QuantEinsum(QuantLayer, LoraEinsum):
    """`nnx.Einsum` whose kernel is 4-bit, in blocks along the axes that the equation sums over.

    Takes every argument of `nnx.Einsum` but `einsum_op`, and `config` and `lora` as `QuantLinear`.

    Raises:
        ValueError: `einsum_op` is given, or the equation sums over no axis of the kernel.

    Example:
        >>> layer = QuantEinsum("btd,dnh->btnh", (64, 2, 4), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 3, 64))).shape
        (1, 3, 2, 4)
    """

    lora_class = LoraEinsum
    unsupported = ("einsum_op",)

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: tuple[int, ...],
        bias_shape: tuple[int, ...] | None = None,
        *,
        config: QuantConfig = DEFAULT,
        lora: LoraConfig | None = None,
        rngs: nnx.Rngs,
        **kwargs,
    ):
        self._refuse(kwargs)
        super().__init__(einsum_str, kernel_shape, bias_shape, rngs=rngs, **kwargs)
        self._init_quantized(config, lora, rngs)

    def _base(self, inputs, einsum_str, out_sharding):
        equation = (einsum_str or self.einsum_str).replace(" ", "")
        bias = None if self.bias is None else self.bias[...]
        x, bias, dtype = self._promote(inputs, bias)
        weight = self._weight
        y = self._multiply(einsum, equation, x.astype(self.product_dtype), weight)
        if bias is not None:
            _, kernel, out = parse(equation, x.ndim, weight.ndim)
            sizes = dict(zip(kernel, weight.shape, strict=True))
            bias = bias.reshape([sizes.get(axis, 1) for axis in out])
        return finish(y, bias, dtype, out_sharding)
