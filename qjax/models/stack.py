"""The blocks of a model, as a list or stacked under `jax.lax.scan`."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.dispatch import target
from qjax.core.qslice import ArraySlice, QSlice
from qjax.core.qtensor import QTensor
from qjax.models.cache import KVCache
from qjax.models.config import ModelConfig
from qjax.models.context import Context
from qjax.models.remat import remat_policy
from qjax.models.step_linear import is_step
from qjax.nn.nnx_param import QuantParam

_UNROLL = 4  # layers of a turn of the loop in generation on a GPU


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
    call = _call
    if config.remat and cache is None:  # generation has no backward pass
        call = nnx.remat(_call, static_argnums=(4,), policy=remat_policy(config.remat_saves))
    for i, block in enumerate(layers):
        x, cache = call(block, x, contexts[config.kinds[i]], cache, i)
    return x, cache


def _call(block, x, context, cache, layer):
    return block(x, context, cache, layer)


def _scan(layers, config, x, contexts, cache):
    # The cache is carried, so that XLA updates it in place. 4-bit weights are not sliced layer by
    # layer, which would copy them: the products index the stack. Of the layers' state only the
    # random streams (dropout) come back out.
    by_index = _by_index(config) if is_step(x, cache) else False
    parts = nnx.RngState, QuantParam, by_index, ...
    graphdef, streams, packed, indexed, weights = nnx.split(layers, *parts)
    kinds = sorted(contexts)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(contexts[k] for k in kinds))

    def body(carry, layer):
        x, cache = carry
        index, kind, streams, weights = layer
        sliced = jax.tree.map(lambda q: QSlice(q, index), packed, is_leaf=_is_qtensor)
        slices = jax.tree.map(lambda a: ArraySlice(a, index), indexed)
        block = nnx.merge(graphdef, streams, sliced, slices, weights)
        context = contexts[kinds[0]]
        if len(kinds) > 1:
            context = jax.tree.map(lambda leaf: leaf[kind], stacked)
        carry = block(x, context, cache, index)
        return carry, nnx.state(block, nnx.RngState)

    if config.remat and cache is None:
        body = jax.checkpoint(body, policy=remat_policy(config.remat_saves))
    indices = jnp.arange(config.num_hidden_layers, dtype=jnp.int32)
    kind_of = jnp.asarray([kinds.index(kind) for kind in config.kinds])
    # A step of generation is many short kernels: fewer turns of the loop, less time between them.
    # Float weights would be sliced for several layers at a time: copied.
    short = cache is not None and x.shape[1] == 1 and target().is_cuda
    unroll = _UNROLL if short and jax.tree.leaves(packed) else 1
    layers_of = indices, kind_of, streams, weights
    carry, streams = jax.lax.scan(body, (x, cache), layers_of, unroll=unroll)
    if cache is None:  # generation draws nothing, and its loop may not change what is outside
        nnx.update(layers, streams)
    return carry


def _by_index(config) -> Callable[[tuple, nnx.Variable], bool]:
    """Return a filter of what the kernels of a step read out of its stack themselves."""
    norms = config.norm != "layer"

    def wanted(path, variable):
        return isinstance(variable, nnx.LoRAParam) or (norms and path[-1] == "scale")

    return wanted


def _is_qtensor(node) -> bool:
    return isinstance(node, QTensor)
