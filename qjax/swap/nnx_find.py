"""The layers of an NNX model whose weights qjax knows how to quantize."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.nn.nnx_einsum import QuantEinsum
from qjax.nn.nnx_embed import QuantEmbed
from qjax.nn.nnx_layer import QuantLayer
from qjax.nn.nnx_linear import QuantLinear, QuantLinearGeneral
from qjax.nn.nnx_param import QuantParam

LAYERS: tuple[type[QuantLayer], ...] = (QuantLinear, QuantLinearGeneral, QuantEinsum, QuantEmbed)
_STOCK_PRODUCTS = (None, jax.lax.dot_general, jnp.einsum)


class Found(NamedTuple):
    """A layer whose weight qjax knows how to quantize."""

    path: str  # "/"-joined, of the layer
    layer: Any  # an nnx.Module
    cls: type[QuantLayer]  # its 4-bit class

    @property
    def weight(self) -> nnx.Variable:
        """Its weight."""
        return getattr(self.layer, self.cls.weight_name)

    @property
    def weight_path(self) -> str:
        """The weight's path."""
        return f"{self.path}/{self.cls.weight_name}".removeprefix("/")

    @property
    def is_quantized(self) -> bool:
        """Whether its weight is in 4 bits, also where the layer itself knows nothing of that."""
        return isinstance(self.weight, QuantParam)

    @property
    def is_own_class(self) -> bool:
        """Whether the layer is exactly Flax's or ours, not a subclass with code of its own."""
        return type(self.layer) in (self.cls, self.cls.lora_class, self.cls.float_class)

    @property
    def runs_fused(self) -> bool:
        """Whether the 4-bit class can stand in: no code and no product of the layer's own."""
        products = [getattr(self.layer, name) for name in self.cls.unsupported]
        return self.is_own_class and all(p in _STOCK_PRODUCTS for p in products)


def find_layers(model: nnx.Module) -> Iterator[Found]:
    """Yield each dense layer and embedding of a model once, shared ones by their first path."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be an nnx.Module, got {type(model).__name__}; for a Linen parameter tree "
            "there are quantize_params and add_lora_params"
        )
    for path, module in nnx.iter_modules(model, graph=True):
        for cls in LAYERS:
            weight = getattr(module, cls.weight_name, None)
            if isinstance(module, cls.float_class) and isinstance(weight, nnx.Variable):
                yield Found("/".join(map(str, path)), module, cls)
