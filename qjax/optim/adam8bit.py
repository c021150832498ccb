"""AdamW whose two moments take a byte a parameter each (arXiv:2110.02861).

A moment is 8-bit codes and a float32 scale for each block of 256 parameters, in their flat order.
The codes are of bitsandbytes' dynamic tables: of both signs for the first moment, positive for the
second.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pallas_kernels.lookup import lookup
from qjax.core.double_quant import dynamic_table

_BLOCK = 256


class ScaleByAdam8bitState(NamedTuple):
    """The state of `scale_by_adam8bit`: trees like the parameters.

    Attributes:
        count: int32 [], the updates so far.
        mu, nu: the moments: uint8 codes of the parameter's shape, or float32 where it is small.
        mu_absmax, nu_absmax: float32 [ceil(size / 256)], or [1], zero, where there are no codes.
    """

    count: jax.Array
    mu: Any
    nu: Any
    mu_absmax: Any
    nu_absmax: Any


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    min_size: int = 4096,
) -> optax.GradientTransformation:
    """AdamW with moments in 8 bits: a quarter of the optimizer state of `optax.adamw`.

    Args:
        learning_rate, b1, b2, eps, weight_decay, mask: as in `optax.adamw`.
        min_size: parameters of fewer values keep float32 moments.

    Raises:
        ValueError: `b1`, `b2` outside 0 to 1, or `min_size` negative.

    Example:
        >>> import optax
        >>> params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
        >>> tx = qjax.adamw8bit(1e-3)
        >>> state = tx.init(params)
        >>> state[0].mu["w"].dtype, state[0].mu["b"].dtype
        (dtype('uint8'), dtype('float32'))
        >>> updates, state = tx.update(params, state, params)
        >>> params = optax.apply_updates(params, updates)
    """
    return optax.chain(
        scale_by_adam8bit(b1, b2, eps, min_size=min_size),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_adam8bit(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, min_size: int = 4096
) -> optax.GradientTransformation:
    """Rescale updates as `optax.scale_by_adam`, the moments in 8 bits; see `adamw8bit`.

    An update is made of the moments before they are rounded.
    """
    for name, value in (("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value} must be from 0 to below 1")
    if min_size < 0:
        raise ValueError(f"min_size={min_size} must be 0 or more")

    def init(params):
        def zeros(signed):
            return jax.tree.map(lambda p: _zeros(p, signed, min_size), params)

        def absmax():
            return jax.tree.map(lambda p: _zero_absmax(p, min_size), params)

        return ScaleByAdam8bitState(
            jnp.zeros((), jnp.int32), zeros(True), zeros(False), absmax(), absmax()
        )

    def update(updates, state, params=None):
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        steps = count.astype(jnp.float32)
        unbias1, unbias2 = 1 - b1**steps, 1 - b2**steps

        def one(g, mu, nu, mu_absmax, nu_absmax):
            wide = g.astype(jnp.float32)
            m = b1 * _decode(mu, mu_absmax, signed=True) + (1 - b1) * wide
            v = b2 * _decode(nu, nu_absmax, signed=False) + (1 - b2) * wide * wide
            step = (m / unbias1) / (jnp.sqrt(v / unbias2) + eps)
            mu, mu_absmax = _encode(m, mu, signed=True)
            nu, nu_absmax = _encode(v, nu, signed=False)
            return step.astype(g.dtype), mu, nu, mu_absmax, nu_absmax

        leaves, treedef = jax.tree.flatten(updates)
        results = [one(*leaf) for leaf in zip(leaves, *map(treedef.flatten_up_to, state[1:]))]
        scaled, *moments = (treedef.unflatten([r[i] for r in results]) for i in range(5))
        return scaled, ScaleByAdam8bitState(count, *moments)

    return optax.GradientTransformation(init, update)


def _is_small(p: jax.Array, min_size: int) -> bool:
    return p.size < max(min_size, 1)


def _zeros(p: jax.Array, signed: bool, min_size: int) -> jax.Array:
    if _is_small(p, min_size):
        return jnp.zeros(p.shape, jnp.float32)
    zero = int(np.searchsorted(dynamic_table(signed), 0))
    return jnp.full(p.shape, zero, jnp.uint8)


def _zero_absmax(p: jax.Array, min_size: int) -> jax.Array:
    return jnp.zeros((1 if _is_small(p, min_size) else -(-p.size // _BLOCK),), jnp.float32)


def _decode(moment: jax.Array, absmax: jax.Array, *, signed: bool) -> jax.Array:
    if moment.dtype != jnp.uint8:
        return moment
    values = _blocks(lookup(dynamic_table(signed), moment)) * absmax[:, None]
    return _unblocked(values, moment.shape)


def _encode(x: jax.Array, like: jax.Array, *, signed: bool) -> tuple[jax.Array, jax.Array]:
    """Round to the nearest entry of the table, block by block; not where `like` holds floats."""
    if like.dtype != jnp.uint8:
        return x, jnp.zeros((1,), jnp.float32)
    table = dynamic_table(signed)
    blocks = _blocks(x)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    scaled = blocks / jnp.where(absmax > 0, absmax, 1)[:, None]
    codes = jnp.searchsorted((table[:-1] + table[1:]) / 2, scaled).astype(jnp.uint8)
    return _unblocked(codes, x.shape), absmax


def _blocks(x: jax.Array) -> jax.Array:
    flat = x.reshape(-1)
    return jnp.pad(flat, (0, -flat.size % _BLOCK)).reshape(-1, _BLOCK)


def _unblocked(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return blocks.reshape(-1)[: int(np.prod(shape))].reshape(shape)
