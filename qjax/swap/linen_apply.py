"""Run a Linen model, one that knows nothing of qjax, on 4-bit kernels with the fused ops."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from qjax.nn.linen_foreign import route_of
from qjax.nn.linen_routes import adapter_dropout, fused_call


def apply(
    module: nn.Module,
    variables: Mapping[str, Any],
    *args: Any,
    method: Any = None,
    mutable: Any = False,
    rngs: Any = None,
    **kwargs: Any,
) -> Any:
    """Call `module.apply` with dense layers and embeddings running on their packed kernels.

    `nn.Dense`, `nn.DenseGeneral` (so Flax's attention too), `nn.Einsum` and `nn.Embed` are routed,
    also inside `nn.scan`, `nn.vmap` and `nn.remat`; so are methods that `qjax.register` names.
    Other modules get decoded kernels.

    Adapters with dropout drop if `rngs` has a "dropout" key and the call does not say
    `deterministic=True`. With `deterministic=False` and no such key Flax raises, as it does for
    `nn.Dropout`.

    Args:
        module: a Linen module.
        variables: with "params" from `quantize_params`.
        args: of the call.
        method: as in `module.apply`.
        mutable: as in `module.apply`.
        rngs: as in `module.apply`.
        kwargs: of the call.

    Returns:
        What `module.apply` returns.

    Example:
        >>> model = nn.Dense(8)
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 64)))
        >>> qparams = qjax.quantize_params(variables["params"])
        >>> qjax.apply(model, {"params": qparams}, jnp.ones((1, 64))).shape
        (1, 8)
    """
    deterministic = kwargs.get("deterministic")
    if not isinstance(deterministic, (bool, np.bool_)):
        deterministic = not (isinstance(rngs, dict) and "dropout" in rngs)
    with fused(deterministic=bool(deterministic)):
        return module.apply(variables, *args, method=method, mutable=mutable, rngs=rngs, **kwargs)


@contextlib.contextmanager
def fused(*, deterministic: bool | None = None) -> Iterator[None]:
    """Route dense layers to the fused ops in every Linen call inside, for code that calls `apply`.

    It has to be active when `jax.jit` traces: a function that was traced outside keeps its trace.

    Args:
        deterministic: True: adapters do not drop out; False: they do; None: they do where the call
            has an rng named "dropout".

    Example:
        >>> model, x = nn.Dense(8), jnp.ones((1, 64))
        >>> qparams = qjax.quantize_params(model.init(jax.random.key(0), x)["params"])
        >>> with qjax.fused():
        ...     y = model.apply({"params": qparams}, x)
    """
    with nn.intercept_methods(_route), adapter_dropout(deterministic):
        yield


def _route(next_fun, args, kwargs, context):
    route = route_of(context, args)
    if route is None:
        return next_fun(*args, **kwargs)
    result = fused_call(route, context.module, *args, **kwargs)
    return next_fun(*args, **kwargs) if result is NotImplemented else result
