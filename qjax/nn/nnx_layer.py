"""What the NNX layers share: the 4-bit weight and its adapter.

Each layer is Flax's own class with two more in its line: `Lora*` adds an adapter beside the weight,
`Quant*` holds the weight in 4 bits. All attributes of a `Quant*` that Flax's class has keep their
names and meaning, so a layer changes its class in place and every reference to it stays good.
"""

import copy
import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.core.blockwise import quantize
from qjax.core.config import QuantConfig
from qjax.core.placement import like, place, weight_shardings
from qjax.core.qslice import QSlice, taken
from qjax.core.qtensor import QTensor
from qjax.nn.equation import WeightAxes
from qjax.nn.lora import LoraConfig, init_adapter
from qjax.nn.nnx_adapter import ADAPTER_ATTRIBUTES
from qjax.nn.nnx_param import QuantParam, adapter_params, quant_metadata, variable_sharding
from qjax.ops import trace
from qjax.ops.dora import column_norms, dora_output, dora_weight
from qjax.ops.lora import block_diagonal, lora_weight

DEFAULT = QuantConfig()


class LoraLayer(nnx.Module):
    """A layer whose weight may have an adapter: y = layer(x) + scaling * (x A) B.

    Attributes:
        lora_config: the adapter's `LoraConfig`, None without an adapter.
        lora_a, lora_b: `nnx.LoRAParam`; A is [*batch, *contract, rank], B is [*batch, rank, *out].
        lora_magnitude: `nnx.LoRAParam` [*batch, *out] of DoRA, None for plain LoRA.
        lora_name: of the adapter; `qjax.set_adapter` puts others in its place.
        lora_dropout: `nnx.Dropout` on the adapter's input, None for no dropout.
        sections: of a layer that stands for several with one input, their output features; each
            has its own adapter: A is [..., sections * rank], and B is theirs side by side.
    """

    float_class: type
    weight_name = "kernel"
    # Defaults in the class, so that a layer without an adapter has Flax's own attributes alone.
    lora_config: Any = None
    lora_a: Any = None
    lora_b: Any = None
    lora_magnitude: Any = None
    lora_dropout: Any = None
    lora_name: str = "default"
    sections: Any = None
    bias: Any = None

    def weight_axes(self) -> WeightAxes:
        """How this layer uses its weight, from its own arguments."""
        raise NotImplementedError

    def init_adapter(self, config: LoraConfig, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        """Give the layer a new adapter, in place of any it has; stacked layers get stacked ones.

        Args:
            config: rank, scaling, dropout and init.
            rngs: its "params" stream gives A, its "dropout" stream the masks.
            dtype: of A and B.

        Raises:
            NotImplementedError: DoRA for an embedding.
        """
        axes = self.weight_axes()
        batch = self._stack() + axes.shape[: axes.batch_ndim]
        outputs = [(n,) for n in self.sections] if self.sections else [axes.out_shape]
        parts = [
            init_adapter(rngs.params(), axes.contract_shape, out, config, batch, dtype)
            for out in outputs
        ]
        a, b = (jnp.concatenate(factor, axis=-1) for factor in zip(*parts, strict=True))
        self.put_adapter(config, a, b, rngs=rngs)

    def put_adapter(
        self, config: LoraConfig, a: Any, b: Any, magnitude: Any = None, *, rngs: nnx.Rngs
    ) -> None:
        """Give the layer the adapter of these arrays, in place of any it has.

        Args:
            config: scaling and dropout.
            a, b: of the shapes that the class describes.
            magnitude: of DoRA; None for one that changes nothing while A B is zero.
            rngs: its "dropout" stream gives the masks.
        """
        self.drop_adapter()
        self.lora_config = config
        weight = getattr(self, self.weight_name)
        self.lora_a, self.lora_b = adapter_params(weight, self.weight_axes(), (a, b))
        if config.dora:
            magnitude = self._norms() if magnitude is None else magnitude
            self.lora_magnitude = nnx.LoRAParam(magnitude)
        if config.dropout:
            self.lora_dropout = nnx.Dropout(config.dropout)
            stream, stack = rngs["dropout"], self._stack()
            self.lora_dropout.rngs = stream.split(stack) if stack else stream.fork()

    def drop_adapter(self) -> None:
        """Remove the adapter."""
        for name in (*ADAPTER_ATTRIBUTES, "lora_name"):
            if name in vars(self):
                delattr(self, name)

    def float_weight(self, dtype: Any = None) -> jax.Array:
        """Return the weight with its adapter merged in: dequantize(W) + scaling * A B.

        It is summed in float32 and rounded once to `dtype` (default: the weight's own).
        """
        variable = getattr(self, self.weight_name)
        q = taken(variable.get_raw_value())
        dtype = jnp.dtype(variable.dtype if dtype is None else dtype)
        if self.lora_a is None:
            return q.dequantize(dtype) if isinstance(q, QTensor) else q.astype(dtype)
        w = q.dequantize(jnp.float32) if isinstance(q, QTensor) else q.astype(jnp.float32)
        axes, scaling = self.weight_axes(), self.lora_config.scaling
        where = axes.contract_axes, w.ndim - len(axes.shape) + axes.batch_ndim
        if self.lora_magnitude is not None:
            magnitude = self.lora_magnitude[...]
            return dora_weight(w, *self._factors(), magnitude, scaling, *where).astype(dtype)
        return (w + like(scaling * lora_weight(*self._factors(), *where), w)).astype(dtype)

    def _factors(self) -> tuple[jax.Array, jax.Array]:
        """Return A and B, whose product is the whole update."""
        return self.lora_a[...], block_diagonal(self.lora_b[...], self.sections)

    def _stack(self) -> tuple[int, ...]:
        shape = getattr(self, self.weight_name).shape
        return tuple(shape[: len(shape) - len(self.weight_axes().shape)])

    def _norms(self) -> jax.Array:
        """Return the norms of DoRA; the shape alone for an abstract weight."""
        axes, w = self.weight_axes(), taken(getattr(self, self.weight_name).get_raw_value())
        norms = functools.partial(
            column_norms,
            scaling=self.lora_config.scaling,
            contract_axes=axes.contract_axes,
            batch_ndim=len(w.shape) - len(axes.shape) + axes.batch_ndim,
        )
        args = w, *self._factors()
        abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(args))
        return jax.eval_shape(norms, *args) if abstract else norms(*args)

    def _adapter_dtype(self, y: jax.Array) -> Any:
        return y.dtype

    def _adapt(
        self, y: jax.Array, x: jax.Array, product, spread, base, spread_bias=None
    ) -> jax.Array:
        """Add scaling * product(x, A, B) to the layer's result y.

        Args:
            y: of the layer without its adapter.
            x: its inputs.
            product: of x and the adapter.
            spread: reshapes a vector [*batch, *out] to broadcast against y.
            base: the layer without its adapter, as a function of x.
            spread_bias: `spread` of the bias, where it is another.
        """
        if self.lora_a is None:
            return y
        dropped = x if self.lora_dropout is None else self.lora_dropout(x)
        # B is scaled, not the product: it is small, and the sum can be one with the product.
        b = self.lora_b[...] * self.lora_config.scaling
        delta = product(dropped.astype(self._adapter_dtype(y)), self.lora_a[...], b)
        if self.lora_magnitude is None:
            return y + like(delta, y).astype(y.dtype)
        again = None if dropped is x else base(dropped)
        factor = spread(self.lora_magnitude[...] / self._norms())
        bias = None if self.bias is None else (spread_bias or spread)(self.bias[...])
        return dora_output(y, again, delta, factor, bias).astype(y.dtype)


class QuantLayer(LoraLayer):
    """A layer whose weight is a `QuantParam`.

    Attributes:
        compute_dtype: what products multiply in where the layer has no `dtype` of its own. The
            result has the dtype that Flax's layer would give: `dtype`, or else what x and the
            parameters promote to.
    """

    lora_class: type
    compute_dtype: Any
    dtype: Any  # this and what follows are Flax's own
    promote_dtype: Any
    preferred_element_type: Any
    unsupported: tuple[str, ...] = ()  # arguments of Flax's class that replace the product

    @classmethod
    def from_float(cls, layer: nnx.Module, config: QuantConfig = DEFAULT, *, name: str = ""):
        """Return a 4-bit copy of a Flax layer; `layer` keeps its float weight.

        Args:
            layer: of the Flax class that this one stands for; stacked layers (`nnx.vmap`) too.
            config: format, block size, double quantization and compute dtype.
            name: what to call the weight in errors, such as its path.

        Raises:
            TypeError: another class of layer.
            ValueError: NaN or inf in the weight, or one that cannot be quantized.
        """
        if not isinstance(layer, cls.float_class):
            raise TypeError(
                f"{cls.__name__}.from_float needs an nnx.{cls.float_class.__name__}, "
                f"got {type(layer).__name__}"
            )
        return cls.convert(copy.copy(layer), config, name=name)

    @classmethod
    def convert(cls, layer: Any, config: QuantConfig, *, name: str = "", weight=None):
        """Turn the layer itself into one of this class, dropping its float weight.

        Args:
            layer: of the Flax class, or that class with an adapter.
            config: as in `from_float`.
            name: as in `from_float`.
            weight: a `QuantParam` that the layer shares with another; None quantizes its own.
        """
        if weight is None:
            variable, name = getattr(layer, cls.weight_name), name or cls.weight_name
            weight = quantize_weight(variable, cls.weight_axes(layer), config, name=name)
        layer.__class__ = cls
        setattr(layer, cls.weight_name, weight)
        layer.compute_dtype = config.compute_dtype
        return layer

    def _init_quantized(self, config: QuantConfig, lora: LoraConfig | None, rngs) -> None:
        """Finish the constructor: Flax's has made the float weight."""
        self.convert(self, config)
        if lora is not None:
            self.init_adapter(lora, rngs)

    @classmethod
    def _refuse(cls, arguments: dict[str, Any]) -> None:
        for name in cls.unsupported:
            if arguments.get(name) is not None:
                raise ValueError(f"{cls.__name__} has its own product and takes no {name}=")

    @property
    def product_dtype(self) -> Any:
        """What this layer's products multiply in."""
        return self.compute_dtype if self.dtype is None else self.dtype

    def _adapter_dtype(self, y: jax.Array) -> Any:
        return self.product_dtype

    def _promote(self, x: Any, bias: Any) -> tuple[jax.Array, Any, Any]:
        """Return x, the bias and the result's dtype, as Flax's layer promotes them."""
        weight = jnp.zeros((), self._weight.dtype)  # stands for the weight's dtype
        x, weight, bias = self.promote_dtype((x, weight, bias), dtype=self.dtype)
        return x, bias, self.preferred_element_type or weight.dtype

    def result_dtype(self, x: jax.Array) -> Any:
        """The dtype of what the layer returns for x."""
        return jnp.dtype(self._promote(x, None)[2])

    @property
    def _weight(self) -> QTensor | QSlice:
        return getattr(self, self.weight_name).q

    def _multiply(self, op, *args: Any) -> jax.Array:
        """Run one of the ops, on the record of the weight's path."""
        path = getattr(self, self.weight_name).get_metadata().get("path")
        if self._stack():
            raise ValueError(
                f"{path or self.weight_name}: a layer was called with a whole stack of weights, "
                f"{list(self._stack())} in front. A 4-bit weight is a qjax.nnx.QuantParam, not an "
                "nnx.Param: name it in the nnx.StateAxes of the scan or vmap too, such as "
                "{(nnx.Param, QuantParam): 0, ...: None}"
            )
        with trace.leaf(path):
            return op(*args)


def quantize_weight(
    variable: nnx.Variable, axes: WeightAxes, config: QuantConfig, *, name: str
) -> QuantParam:
    """Quantize a weight that is used as `axes` says; an abstract one stays abstract.

    Raises:
        ValueError: its shape is not the layer's own behind stacked axes; NaN or inf.
        TypeError: it is not floating.
    """
    w = variable.get_raw_value()
    batch_ndim = stacked_ndim(tuple(w.shape), axes, name) + axes.batch_ndim
    q = quantize(w, config, axes.contract_axes, batch_ndim=batch_ndim, name=name)
    sharding = variable_sharding(variable)
    if sharding is not None:
        q = place(q, weight_shardings(q, sharding, name))
    return QuantParam(q, **quant_metadata(variable))


def stacked_ndim(shape: tuple[int, ...], axes: WeightAxes, name: str) -> int:
    """Return how many stacked axes (`nnx.vmap` over layers) a weight has in front of its own."""
    stack = len(shape) - len(axes.shape)
    if stack < 0 or shape[stack:] != axes.shape:
        message = f"{name}: shape {shape} is not {list(axes.shape)} behind stacked axes"
        if stack > 0 and not Counter(axes.shape) - Counter(shape):
            message += "; stack layers along axis 0, with out_axes=0 of nnx.vmap or nnx.scan"
        raise ValueError(message)
    return stack


def finish(y: jax.Array, bias: Any, dtype: Any, out_sharding: Any) -> jax.Array:
    """Cast a product to the layer's dtype, place it and add the bias, shaped to broadcast."""
    y = y.astype(dtype)
    if out_sharding is not None:
        y = jax.sharding.reshard(y, out_sharding)
    return y if bias is None else y + bias.astype(dtype)
