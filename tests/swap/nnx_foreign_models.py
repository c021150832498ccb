"""NNX models as other libraries write them: parameters in modules of their own, no nnx.Linear."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.nnx import QuantParam

VOCAB, DIM, HEADS, HEAD_DIM, HIDDEN, EXPERTS = 50, 64, 2, 32, 96, 4
F32 = qjax.QuantConfig(block_size=32, compute_dtype=jnp.float32)
IDS = np.arange(6).reshape(2, 3)
WARNING = r"decode their whole 4-bit weight at each call: layers/0/moe/down, layers/0/moe/up; "
# float32 sums in another order, of numbers around 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class Einsum(nnx.Module):
    """An equation, and a parameter of any shape, with a sharding."""

    def __init__(self, einsum_str, shape, rngs, dtype=None):
        self.einsum_str, self.shape, self.dtype = einsum_str, shape, dtype
        self.w = nnx.Param(
            0.1 * rngs.normal(shape), out_sharding=(None,) * len(shape), eager_sharding=False
        )

    @jax.named_scope("einsum")
    def __call__(self, x):
        w = self.w[...]
        if self.dtype is not None:
            x, w = x.astype(self.dtype), w.astype(self.dtype)
        return jnp.einsum(self.einsum_str, x, w)


class Embedder(nnx.Module):
    def __init__(self, rngs):
        self.input_embedding = nnx.Param(rngs.normal((VOCAB, DIM)))

    def encode(self, ids):
        return self.input_embedding[(ids,)] * 0.5

    def decode(self, x):
        return x @ self.input_embedding[...].T


class Norm(nnx.Module):
    def __init__(self, rngs):
        self.scale = nnx.Param(jnp.ones(DIM))

    def __call__(self, x):
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * self.scale[...]


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.qkv = Einsum("btd,sndh->sbtnh", (3, HEADS, DIM, HEAD_DIM), rngs)
        self.o_proj = Einsum("btnh,nhd->btd", (HEADS, HEAD_DIM, DIM), rngs, dtype=jnp.float32)
        self.q_bias = nnx.Param(jnp.ones((HEADS, HEAD_DIM)))

    def block(self, x):
        q, k, v = self.qkv(x)
        share = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q + self.q_bias[...], k))
        return self.o_proj(jnp.einsum("bnts,bsnh->btnh", share, v))

    def __call__(self, x):
        graphdef, state = nnx.split(self)
        return jax.checkpoint(lambda state, x: nnx.merge(graphdef, state).block(x))(state, x)


class Experts(nnx.Module):
    """Every token through one expert: a batched einsum up, a ragged product down."""

    def __init__(self, rngs):
        self.router = nnx.Linear(DIM, EXPERTS, use_bias=False, rngs=rngs)
        self.up = nnx.Param(0.1 * rngs.normal((EXPERTS, DIM, HIDDEN)))
        self.down = nnx.Param(0.1 * rngs.normal((EXPERTS, HIDDEN, DIM)))
        self.per_expert_scale = nnx.Param(jnp.ones((EXPERTS,)))

    def __call__(self, x):
        tokens = x.reshape(-1, DIM)
        chosen = self.router(tokens).argmax(-1)
        hidden = jnp.einsum("nd,edf->nef", tokens, self.up[...])
        hidden = jax.nn.silu(jnp.take_along_axis(hidden, chosen[:, None, None], 1)[:, 0])
        order = jnp.argsort(chosen)
        sizes = jnp.bincount(chosen, length=EXPERTS)
        out = jax.lax.ragged_dot(hidden[order], self.down[...], sizes)
        return (out[jnp.argsort(order)] * self.per_expert_scale[chosen][:, None]).reshape(x.shape)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.attn = Norm(rngs), Attention(rngs)
        self.moe = Experts(rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.moe(x)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embedder = Embedder(rngs)
        self.layers = nnx.List([Block(rngs)])
        self.lm_head = Einsum("btd,dv->btv", (DIM, VOCAB), rngs)

    def __call__(self, ids):
        x = self.embedder.encode(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def quantized(cfg=F32, warning=WARNING):
    with pytest.warns(UserWarning, match=warning):
        return qjax.quantize_model(Model(nnx.Rngs(0)), cfg)


def weights(model):
    return {
        "/".join(map(str, path)): variable
        for path, variable in nnx.to_flat_state(nnx.state(model, QuantParam))
    }


def by_hand(model):
    """The float model, which knows nothing of qjax, with the weights of `model` decoded."""
    plain = Model(nnx.Rngs(0))
    floats = {"/".join(map(str, p)): v for p, v in nnx.to_flat_state(nnx.state(plain))}
    for path, variable in weights(model).items():
        floats[path].set_value(variable.q.dequantize())
    return plain
