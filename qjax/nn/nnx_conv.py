"""nnx.Conv with a kernel of size 1, which is a matmul: with an adapter, and in 4 bits."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from qjax.core.config import QuantConfig
from qjax.nn.equation import WeightAxes
from qjax.nn.lora import LoraConfig
from qjax.nn.nnx_layer import DEFAULT, LoraLayer, QuantLayer, finish
from qjax.ops.lora import lora_matmul
from qjax.ops.matmul import matmul


def is_pointwise(conv: nnx.Conv) -> bool:
    """Return whether a convolution multiplies each (strided) position by one matrix."""
    padded = np.any(conv.padding) if not isinstance(conv.padding, str) else False
    return bool(
        set(conv.kernel_size) == {1}
        and conv.feature_group_count == 1
        and conv.mask is None
        and not padded
        and np.all(np.asarray(conv.input_dilation or 1) == 1)
        and conv.conv_general_dilated is jax.lax.conv_general_dilated
    )


class LoraConv(LoraLayer, nnx.Conv):
    """`nnx.Conv` of kernel size 1 with an adapter beside its float kernel."""

    float_class = nnx.Conv

    def weight_axes(self) -> WeightAxes:
        """See `LoraLayer`.

        Raises:
            ValueError: the convolution is no matmul.
        """
        if not is_pointwise(self):
            raise ValueError(
                f"a convolution of kernel_size={self.kernel_size} is no matmul: it must be 1, with "
                "no padding, dilation of the input, groups or mask"
            )
        shape = (*self.kernel_size, self.in_features, self.out_features)
        return WeightAxes(shape, 0, tuple(range(len(shape) - 1)))

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        """Apply the layer to [*batch, *spatial, in_features]."""
        return self._adapt(self._base(inputs, out_sharding), self._strided(inputs), lora_matmul)

    def _base(self, inputs, out_sharding):
        return nnx.Conv.__call__(self, inputs, out_sharding=out_sharding)

    def _strided(self, x: jax.Array) -> jax.Array:
        """Return the positions that the kernel falls on."""
        count = len(self.kernel_size)
        strides: Any = np.broadcast_to(self.strides or 1, count)
        return x[(..., *(slice(None, None, int(stride)) for stride in strides), slice(None))]


class QuantConv(QuantLayer, LoraConv):
    """`nnx.Conv` of kernel size 1 whose kernel [1, ..., in, out] is a frozen 4-bit weight.

    Takes every argument of `nnx.Conv`, and `config` and `lora` as `QuantLinear` does.

    Raises:
        ValueError: the convolution is no matmul: another kernel size, groups, a mask or padding.

    Example:
        >>> layer = QuantConv(64, 8, (1, 1), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 5, 5, 64))).shape
        (2, 5, 5, 8)
    """

    lora_class = LoraConv

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        *,
        config: QuantConfig = DEFAULT,
        lora: LoraConfig | None = None,
        rngs: nnx.Rngs,
        **kwargs,
    ):
        super().__init__(in_features, out_features, kernel_size, strides, rngs=rngs, **kwargs)
        self._init_quantized(config, lora, rngs)

    def _base(self, inputs, out_sharding):
        bias = None if self.bias is None else self.bias[...]
        x, bias, dtype = self._promote(self._strided(inputs), bias)
        y = self._multiply(matmul, x.astype(self.product_dtype), self._weight)
        if bias is not None:
            bias = bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return finish(y, bias, dtype, out_sharding)
