"""nnx.Embed with an adapter, and in 4 bits."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.core.config import QuantConfig
from qjax.core.placement import like
from qjax.nn.equation import WeightAxes
from qjax.nn.lora import LoraConfig
from qjax.nn.nnx_layer import DEFAULT, LoraLayer, QuantLayer, finish
from qjax.ops.lora import lora_matmul, lora_take
from qjax.ops.matmul import matmul
from qjax.ops.take import take


class LoraEmbed(LoraLayer, nnx.Embed):
    """`nnx.Embed` with an adapter beside its float table; made by `qjax.add_lora`.

    A is [features, rank] and B is [rank, num_embeddings]: the table becomes W + scaling * (A B)^T.
    """

    float_class = nnx.Embed
    weight_name = "embedding"

    def weight_axes(self) -> WeightAxes:
        """See `LoraLayer`: `attend` sums over the features."""
        return WeightAxes((self.num_embeddings, self.features), 0, (1,))

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        """Look up rows: integers of any shape to [..., features]."""
        y = self._base(inputs, out_sharding)
        if self.lora_a is None:
            return y
        if self.num_embeddings == 1:  # Flax broadcasts its one row, whatever the inputs
            inputs = jnp.zeros_like(inputs)
        dtype = self._adapter_dtype(y)
        delta = lora_take(inputs, self.lora_a[...], self.lora_b[...], dtype)
        return y + like(delta * self.lora_config.scaling, y).astype(y.dtype)

    def put_adapter(self, config: LoraConfig, *args: Any, **kwargs: Any) -> None:
        """See `LoraLayer`.

        Raises:
            NotImplementedError: DoRA, whose norms a look-up would need of all rows.
        """
        if config.dora:
            raise NotImplementedError("dora=True for an embedding: leave it out by exclude=")
        super().put_adapter(config, *args, **kwargs)

    def attend(self, query: jax.Array, out_sharding=None) -> jax.Array:
        """Multiply [..., features] by the table's rows: [..., num_embeddings]."""
        return self._adapt(self._attend_base(query, out_sharding), query, lora_matmul, None, None)

    def _base(self, inputs, out_sharding):
        return nnx.Embed.__call__(self, inputs, out_sharding=out_sharding)

    def _attend_base(self, query, out_sharding):
        return nnx.Embed.attend(self, query, out_sharding=out_sharding)


class QuantEmbed(QuantLayer, LoraEmbed):
    """`nnx.Embed` whose table [num_embeddings, features] is 4-bit, in blocks along the features.

    Takes every argument of `nnx.Embed`, and `config` and `lora` as `QuantLinear` does. A look-up
    decodes the rows that it returns and no others; the adapter's dropout acts in `attend` alone.

    Example:
        >>> layer = QuantEmbed(10, 64, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([1, 2])).shape, layer.attend(jnp.ones((3, 64))).shape
        ((2, 64), (3, 10))
    """

    lora_class = LoraEmbed
    preferred_element_type = None

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        config: QuantConfig = DEFAULT,
        lora: LoraConfig | None = None,
        rngs: nnx.Rngs,
        **kwargs,
    ):
        super().__init__(num_embeddings, features, rngs=rngs, **kwargs)
        self._init_quantized(config, lora, rngs)

    def _base(self, inputs, out_sharding):
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(f"inputs must be integers, got {inputs.dtype}")
        if self.num_embeddings == 1:  # Flax broadcasts its one row, whatever the inputs
            inputs = jnp.zeros_like(inputs)
        (table,) = self.promote_dtype(
            (jnp.zeros((), self._weight.dtype),), dtype=self.dtype, inexact=False
        )
        y = self._multiply(lambda q, ids: take(q, ids, dtype=table.dtype), self._weight, inputs)
        return finish(y, None, table.dtype, out_sharding)

    def _attend_base(self, query, out_sharding):
        weight = jnp.zeros((), self._weight.dtype)
        query, weight = self.promote_dtype((query, weight), dtype=self.dtype)
        y = self._multiply(matmul, query.astype(self.product_dtype), self._weight)
        return finish(y, None, weight.dtype, out_sharding)
