"""The blocks of a model, as a list or stacked under `jax.lax.scan`."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.models.cache import KVCache
from qjax.models.config import ModelConfig
from qjax.models.context import Context


def make_layers(make: Callable[[nnx.Rngs], nnx.Module], config: ModelConfig, rngs: nnx.Rngs):
    """Return an `nnx.List` of blocks, or one block with stacked arrays for `config.scan_layers`."""
    if config.scan_layers:
        return nnx.split_rngs(splits=config.num_hidden_layers)(nnx.vmap(make))(rngs)
    return nnx.List(make(rngs) for _ in range(config.num_hidden_layers))


def run_layers(
    layers,
    config: ModelConfig,
    x: jax.Array,
    contexts: Mapping[str, Context],
    cache: KVCache | None,
) -> tuple[jax.Array, KVCache | None]:
    """Send the stream x [B, T, hidden] through the layers; return it and the cache."""
    run = _scan if config.scan_layers else _loop
    return run(layers, config, x, contexts, cache)


def _loop(layers, config, x, contexts, cache):
    call = nnx.remat(_call, static_argnums=(4,)) if config.remat else _call
    for i, block in enumerate(layers):
        x, cache = call(block, x, contexts[config.kinds[i]], cache, i)
    return x, cache


def _call(block, x, context, cache, layer):
    return block(x, context, cache, layer)


def _scan(layers, config, x, contexts, cache):
    # The cache is carried, so that XLA updates it in place. Of the layers' state only the random
    # streams (dropout) come back out: the weights stay where they are.
    graphdef, streams, weights = nnx.split(layers, nnx.RngState, ...)
    kinds = sorted(contexts)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(contexts[k] for k in kinds))

    def body(carry, layer):
        x, cache = carry
        index, kind, streams, weights = layer
        block = nnx.merge(graphdef, streams, weights)
        context = contexts[kinds[0]]
        if len(kinds) > 1:
            context = jax.tree.map(lambda leaf: leaf[kind], stacked)
        carry = block(x, context, cache, index)
        return carry, nnx.state(block, nnx.RngState)

    body = jax.checkpoint(body) if config.remat else body
    indices = jnp.arange(config.num_hidden_layers)
    kind_of = jnp.asarray([kinds.index(kind) for kind in config.kinds])
    carry, streams = jax.lax.scan(body, (x, cache), (indices, kind_of, streams, weights))
    nnx.update(layers, streams)
    return carry
