"""Llama shapes with random packed weights, made on the device: no float copy ever exists."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

import qjax
from qjax.models import CausalLM, ModelConfig, RopeConfig

_LLAMA_3 = RopeConfig(theta=500_000.0)
SHAPES = {
    "tiny": ModelConfig(256, 128, 256, 3, 4, 2, 32, scan_layers=True, remat=True),
    "llama-2-7b": ModelConfig(32000, 4096, 11008, 32, 32, 32, 128, 4096),
    "llama-3-8b": ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192, rope=_LLAMA_3),
    "llama-3-70b": ModelConfig(128256, 8192, 28672, 80, 64, 8, 128, 8192, rope=_LLAMA_3),
}


def shape(name: str, **changes) -> ModelConfig:
    """Return a shape, its layers stacked and recomputed in the backward pass."""
    return dataclasses.replace(SHAPES[name], scan_layers=True, remat=True, **changes)


def abstract_model(
    config: ModelConfig, *, quantized: bool = True, rank: int | None = 16, fused: bool = True
) -> CausalLM:
    """Return a model of shapes: NF4 with double quantization, or bfloat16.

    Args:
        config: its shape.
        quantized: 4 bits for all linear layers but the head.
        rank: of adapters on all linear layers but the head; None for none.
        fused: one product for queries, keys and values, and one for gate and up.
    """

    def build():
        model = CausalLM(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        if fused:
            qjax.fuse_projections(model)
        if quantized:
            qjax.quantize_model(model, qjax.QuantConfig(compute_dtype=jnp.bfloat16))
        if rank is not None:
            lora = qjax.LoraConfig(rank=rank, include=None if quantized else "_proj$")
            qjax.add_lora(model, lora, rngs=nnx.Rngs(0))
        return model

    return nnx.eval_shape(build)


def random_model(config: ModelConfig, **options) -> CausalLM:
    """Return a model of random weights; the options are those of `abstract_model`."""
    graphdef, state = nnx.split(abstract_model(config, **options))
    paths, treedef = jax.tree_util.tree_flatten_with_path(state)
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(paths))
    leaves = [
        fill(key, jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for key, (path, leaf) in zip(keys, paths)
    ]
    return jax.block_until_ready(nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves)))


def fill(key: jax.Array, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Return random values of a leaf: weights of size 0.03, scales to match, norms of one."""
    if path.endswith("offset/value") or path.endswith("offset"):
        return jnp.full(leaf.shape, 0.05, leaf.dtype)
    if "norm" in path:
        return jnp.ones(leaf.shape, leaf.dtype)
    if "scales" in path and leaf.dtype == jnp.float32:  # the second level, or the only one
        return jnp.full(leaf.shape, 0.01 if "absmax" in path else 0.05, leaf.dtype)
    return _random(key, leaf.shape, leaf.dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random(key, shape, dtype):
    def one(key, shape):
        if dtype == jnp.uint8:
            return jax.random.bits(key, shape, dtype)
        return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    if math.prod(shape) < 2**26:
        return one(key, shape)
    # Slice by slice: small temporaries.
    return jax.lax.map(lambda key: one(key, shape[1:]), jax.random.split(key, shape[0]))


def parameters(config: ModelConfig) -> tuple[int, int]:
    """Return the parameters of the blocks' linear layers, and of the head."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    block = hidden * (2 * query + 2 * kv) + 3 * hidden * inner
    return config.num_hidden_layers * block, hidden * config.vocab_size


def weight_bytes(model) -> int:
    """Return the bytes of all arrays of a model."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
