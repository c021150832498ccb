"""Linen's dense layers with a 4-bit kernel: Flax's own, whose kernel parameter is a QuantBox.

Each is a subclass of the Flax layer that it stands for. `init` lets Flax make the float parameters
and quantizes the kernel, so names, shapes and random numbers are Flax's own.
"""

import flax.linen as nn
import jax

from qjax.core.config import QuantConfig
from qjax.nn.linen_box import box_kernel, with_adapter
from qjax.nn.linen_routes import ROUTES, Route, fused_call, has_box, path_of
from qjax.nn.lora import LoraConfig


class QuantDense(nn.Dense):
    """`nn.Dense` with a 4-bit kernel, and a LoRA adapter if asked.

    It takes the parameters that `qjax.quantize_params` makes from those of an `nn.Dense`; a kernel
    that was left in floating point runs as in Flax.

    Attributes:
        config: how `init` quantizes; its overrides apply to this layer's path, its include and
            exclude do not. Products run in `dtype` if given, else in `config.compute_dtype`.
        lora: adapter that `init` makes; None for none. Adapters that the parameters hold are used
            in any case.
        deterministic: True: no adapter dropout; False: dropout, which needs an rng named "dropout";
            None: dropout if there is such an rng.
        others: Flax's own. `precision` plays no part in the 4-bit product, which accumulates in
            float32.

    Example:
        >>> layer = QuantDense(features=8, lora=qjax.LoraConfig(rank=4))
        >>> params = layer.init(jax.random.key(0), jnp.ones((1, 64)))["params"]
        >>> params["kernel"].q.shape, params["kernel"].lora_a.shape, params["bias"].shape
        ((64, 8), (64, 4), (8,))
    """

    config: QuantConfig = QuantConfig()
    lora: LoraConfig | None = None
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Multiply [..., in] by the kernel: [..., features]."""
        return _call(self, nn.Dense, "__call__", super().__call__, inputs)


class QuantDenseGeneral(nn.DenseGeneral):
    """`nn.DenseGeneral` with a 4-bit kernel; see `QuantDense`.

    Blocks run along the axes that are contracted; each batch slice is quantized on its own.

    Example:
        >>> layer = QuantDenseGeneral(features=(2, 16))
        >>> params = layer.init(jax.random.key(0), jnp.ones((1, 64)))["params"]
        >>> params["kernel"].q.shape
        (64, 2, 16)
    """

    config: QuantConfig = QuantConfig()
    lora: LoraConfig | None = None
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Contract `axis` of the inputs with the kernel."""
        return _call(self, nn.DenseGeneral, "__call__", super().__call__, inputs)


class QuantEinsum(nn.Einsum):
    """`nn.Einsum` with a 4-bit kernel; see `QuantDense`.

    Axes of the kernel that the result lacks are contracted; leading ones that inputs and result
    share are batch axes. The equation of the first call, `init`, decides.

    Raises:
        ValueError: the equation sums over no axis of the kernel.

    Example:
        >>> layer = QuantEinsum(shape=(64, 2, 16), einsum_str="btd,dnh->btnh")
        >>> layer.init(jax.random.key(0), jnp.ones((1, 3, 64)))["params"]["kernel"].q.contract_axes
        (0,)
    """

    config: QuantConfig = QuantConfig()
    lora: LoraConfig | None = None
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array, einsum_str: str | None = None) -> jax.Array:
        """Contract the inputs with the kernel as the equation says."""
        return _call(self, nn.Einsum, "__call__", super().__call__, inputs, einsum_str)


class QuantEmbed(nn.Embed):
    """`nn.Embed` with a 4-bit table; see `QuantDense`. A lookup decodes only the rows it returns.

    Blocks run along the features. An adapter here has no dropout.

    Example:
        >>> layer = QuantEmbed(num_embeddings=10, features=64)
        >>> params = layer.init(jax.random.key(0), jnp.array([1, 2]))
        >>> layer.apply(params, jnp.array([1, 2])).shape
        (2, 64)
    """

    config: QuantConfig = QuantConfig()
    lora: LoraConfig | None = None
    deterministic: bool | None = None

    def setup(self):
        """Make the table, or leave the one in the parameters packed."""
        if has_box(self, "embedding"):
            return
        fresh = not self.has_variable("params", "embedding")
        super().setup()
        if fresh:
            _quantize(self, "embedding", (1,), 0)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Return the rows of the table that the integers name: [*inputs.shape, features]."""
        return _call(self, nn.Embed, "__call__", super().__call__, inputs)

    def attend(self, query: jax.Array) -> jax.Array:
        """Multiply [..., features] by the transposed table: [..., num_embeddings]."""
        return _call(self, nn.Embed, "attend", super().attend, query)


def _call(module, flax_class: type[nn.Module], method: str, float_call, *args) -> jax.Array:
    """Run the fused route, after Flax has made the parameters if they are not there."""
    route: Route = ROUTES[flax_class][method]
    fresh = not module.has_variable("params", route.param)
    if fresh:
        float_call(*args)
        kernel = route.kernel(module, *args)
        if kernel is None:
            raise ValueError(
                f"{path_of(module)}: einsum_str={args[1] or module.einsum_str!r} must be "
                f"'x,w->out' and sum over an axis of the kernel {module.shape} to quantize along"
            )
        _quantize(module, route.param, kernel.contract_axes, kernel.batch_ndim)
    result = fused_call(route, module, *args)
    return float_call(*args) if result is NotImplemented else result


def _quantize(module, param: str, contract_axes: tuple[int, ...], batch_ndim: int) -> None:
    """Put a QuantBox in the place of a parameter that Flax has just made."""
    path = path_of(module, param)
    w = module.get_variable("params", param)
    box = box_kernel(w, module.config.at(path), contract_axes, batch_ndim, path)
    if module.lora is not None:
        box = with_adapter(box, module.lora, module.make_rng("params"), path)
    module.put_variable("params", param, box)
