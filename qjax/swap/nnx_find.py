"""The weights of an NNX model that can be quantized: of Flax's layers, and of any other module."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.core.config import QuantConfig
from qjax.nn.equation import WeightAxes
from qjax.nn.lora import LoraConfig
from qjax.nn.nnx_conv import QuantConv, is_pointwise
from qjax.nn.nnx_einsum import QuantEinsum
from qjax.nn.nnx_embed import QuantEmbed
from qjax.nn.nnx_layer import LoraLayer, QuantLayer
from qjax.nn.nnx_linear import QuantLinear, QuantLinearGeneral
from qjax.nn.nnx_param import QuantParam

LAYERS: tuple[type[QuantLayer], ...] = (
    QuantLinear,
    QuantLinearGeneral,
    QuantEinsum,
    QuantEmbed,
    QuantConv,
)
_STOCK_PRODUCTS = (None, jax.lax.dot_general, jnp.einsum)


class Found(NamedTuple):
    """The weight of a layer of Flax's.

    `qjax/swap/nnx_raw.py` has its counterpart for other modules, with the same attributes.
    """

    path: str  # "/"-joined, of the layer
    layer: Any  # an nnx.Module
    cls: type[QuantLayer]  # its 4-bit class

    @property
    def weight(self) -> nnx.Variable:
        """The weight."""
        return getattr(self.layer, self.cls.weight_name)

    @property
    def weight_path(self) -> str:
        """The weight's path."""
        return f"{self.path}/{self.cls.weight_name}".removeprefix("/")

    @property
    def role(self) -> str:
        """What `skip_reason` calls it."""
        return "embedding" if self.cls is QuantEmbed else "dense"

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is in 4 bits, also where the layer itself knows nothing of that."""
        return isinstance(self.weight, QuantParam)

    @property
    def is_adapted(self) -> bool:
        """Whether it has an adapter."""
        return isinstance(self.layer, LoraLayer) and self.layer.lora_a is not None

    @property
    def runs_fused(self) -> bool:
        """Whether the 4-bit class can stand in: no product of the layer's own."""
        products = [getattr(self.layer, name) for name in self.cls.unsupported]
        return all(p in _STOCK_PRODUCTS for p in products)

    @property
    def use(self) -> Any:
        """What weights that share one array have to have in common."""
        return self.cls, self.runs_fused

    def axes(self) -> WeightAxes:
        """How the layer uses the weight; raises ValueError where that cannot be said."""
        return self.cls.weight_axes(self.layer)

    def put(self, weight: QuantParam, cfg: QuantConfig) -> None:
        """Put a 4-bit weight in place of the float one."""
        if self.runs_fused:
            self.cls.convert(self.layer, cfg, weight=weight)
        else:
            setattr(self.layer, self.cls.weight_name, weight)

    def check_adapter(self, cfg: LoraConfig) -> None:
        """Raise ValueError if the weight cannot have a new adapter."""
        if self.is_adapted:
            raise ValueError(f"{self.path} has an adapter already; merge_lora ends it")

    def add_adapter(self, cfg: LoraConfig, rngs: nnx.Rngs, dtype: Any) -> None:
        """Give the weight an adapter."""
        if not isinstance(self.layer, LoraLayer):
            self.layer.__class__ = self.cls.lora_class
        self.layer.init_adapter(cfg, rngs, dtype)

    def merged(self, dtype: Any) -> jax.Array:
        """Return the float weight with its adapter merged in."""
        return self.layer.float_weight(dtype)

    def to_float(self, weight: nnx.Param, keep_adapter: bool) -> None:
        """Put a float weight in place of the 4-bit one."""
        layer = self.layer
        if "compute_dtype" in vars(layer):
            del layer.compute_dtype
        if isinstance(layer, LoraLayer):
            if not keep_adapter:
                layer.drop_adapter()
            layer.__class__ = self.cls.lora_class if keep_adapter else self.cls.float_class
        setattr(layer, self.cls.weight_name, weight)


def find_layers(model: nnx.Module) -> Iterator[Found]:
    """Yield each dense layer and embedding of a model once, shared ones by their first path.

    Layers of Flax's classes and ours alone: a subclass may have code of its own.
    """
    check_model(model)
    for path, module in nnx.iter_modules(model, graph=True):
        cls = layer_class(module)
        if cls is not None and type(module) in (cls, cls.lora_class, cls.float_class):
            yield Found("/".join(map(str, path)), module, cls)


def layer_class(module: Any) -> type[QuantLayer] | None:
    """Return the 4-bit class for a layer of Flax's or a subclass, if it has its weight."""
    for cls in LAYERS:
        weight = getattr(module, cls.weight_name, None)
        if isinstance(module, cls.float_class) and isinstance(weight, nnx.Variable):
            return None if isinstance(module, nnx.Conv) and not is_pointwise(module) else cls
    return None


def check_model(model: Any) -> None:
    """Raise TypeError unless it is an NNX module."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be an nnx.Module, got {type(model).__name__}; for a Linen parameter tree "
            "there are quantize_params and add_lora_params"
        )
