"""An NNX model of Flax's own layers, and which of its weights surgery takes."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

import qjax
from qjax.nnx import QuantEinsum, QuantEmbed, QuantLinear, QuantLinearGeneral

F32 = qjax.QuantConfig(block_size=32, compute_dtype=jnp.float32)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(2, 64, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(64, 96, rngs=rngs), nnx.gelu, nnx.Linear(96, 64, rngs=rngs)
        )
        self.mix = nnx.Einsum("btd,de->bte", (64, 64), (64,), rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm(x))
        return self.mix(x + self.mlp(x))


class Model(nnx.Module):
    def __init__(self, rngs, blocks=2):
        self.embed = nnx.Embed(50, 64, rngs=rngs)
        self.blocks = nnx.List(Block(rngs) for _ in range(blocks))
        self.by_name = nnx.Dict(out=nnx.Linear(64, 64, rngs=rngs))
        self.lm_head = nnx.Linear(64, 50, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.by_name["out"](x))


IDS = np.arange(6).reshape(2, 3)
QUANTIZED = {
    f"blocks/{i}/attn/{name}" for i in range(2) for name in ("query", "key", "value", "out")
}
QUANTIZED |= {f"blocks/{i}/{name}" for i in range(2) for name in ("mlp/layers/0", "mlp/layers/2")}
QUANTIZED |= {"blocks/0/mix", "blocks/1/mix", "by_name/out"}


def modules(model):
    return {"/".join(map(str, path)): m for path, m in nnx.iter_modules(model, graph=True)}


def quantized(model):
    kinds = (QuantLinear, QuantLinearGeneral, QuantEinsum, QuantEmbed)
    return {path for path, m in modules(model).items() if type(m) in kinds}


def decoded(model, plain):
    """The float model `plain`, with the weights of `model` decoded by hand."""
    for path, layer in modules(model).items():
        name = "embedding" if isinstance(layer, nnx.Embed) else "kernel"
        if path in quantized(model):
            modules(plain)[path].__dict__[name][...] = getattr(layer, name).q.dequantize()
    return plain
