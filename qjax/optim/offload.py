"""Optimizer state in the host's memory: what bitsandbytes' paged optimizers are for."""

from typing import Any

import jax
import optax

from qjax.core.placement import on_device


def offload_state(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keep the state of an optimizer in pinned host memory, fetched for each update.

    The device holds the moments while they are used, and the rest of the time has their memory for
    activations; each step copies them both ways. For bitsandbytes' `paged_adamw_8bit` take
    `offload_state(adamw8bit(...))`: there the driver moves a page when memory is short, and JAX has
    no such pages, so here the state always moves. Scalars stay on the device. The updates are those
    of `tx`; compile the step (`jax.jit`, `nnx.jit`).

    Args:
        tx: any optax transformation whose state is a tree of arrays.

    Example:
        >>> import optax
        >>> params = {"w": jnp.ones((64, 64))}
        >>> tx = qjax.offload_state(qjax.adamw8bit(1e-3))
        >>> state = tx.init(params)
        >>> state[0].mu["w"].sharding.memory_kind
        'pinned_host'
        >>> updates, state = jax.jit(tx.update)(params, state, params)
        >>> updates["w"].sharding.memory_kind, state[0].mu["w"].sharding.memory_kind
        ('device', 'pinned_host')
    """

    def init(params):
        return _to_host(tx.init(params))

    def update(updates, state, params=None, **extra_args):
        updates, state = tx.update(updates, on_device(state), params, **extra_args)
        return updates, _to_host(state)

    return optax.GradientTransformationExtraArgs(init, update)


def _to_host(state: Any) -> Any:
    def move(a):
        return jax.device_put(a, jax.memory.Space.Host) if a.ndim else a

    return jax.tree.map(move, state)
