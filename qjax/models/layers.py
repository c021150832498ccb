"""One decoder block: attention and a gated MLP, each after an RMSNorm, each added to the stream.

The blocks are made of plain `nnx.Linear`, called as functions, so that any layer of the same call
(a quantized one, one with an adapter) can stand in their place.
"""

from typing import Any

import jax
from flax import nnx

from qjax.models.cache import KVCache, write
from qjax.models.config import ModelConfig
from qjax.models.rope import rotate

ACTIVATIONS = {"silu": nnx.silu, "gelu_pytorch_tanh": nnx.gelu, "relu": nnx.relu}


def rms_norm(config: ModelConfig, dtype, param_dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Return the family's norm over the stream."""
    return nnx.RMSNorm(
        config.hidden_size,
        epsilon=config.rms_norm_eps,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Causal self-attention with grouped key-value heads and rotary positions."""

    def __init__(self, config: ModelConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        query_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim

        def linear(fan_in, fan_out):
            return nnx.Linear(
                fan_in,
                fan_out,
                use_bias=config.attention_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.q_proj = linear(config.hidden_size, query_width)
        self.k_proj = linear(config.hidden_size, kv_width)
        self.v_proj = linear(config.hidden_size, kv_width)
        self.o_proj = linear(query_width, config.hidden_size)

    def __call__(self, x, rope, mask, cache: KVCache | None, layer):
        """Map x [B, T, hidden] to (attended [B, T, hidden], cache); arguments as in `Block`."""
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.head_dim)
        q = rotate(self.q_proj(x).reshape(heads), *rope)
        k = rotate(self.k_proj(x).reshape(heads), *rope)
        v = self.v_proj(x).reshape(heads)
        if cache is not None:
            cache, k, v = write(cache, layer, k, v)
            k, v = k.astype(q.dtype), v.astype(q.dtype)
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None)
        return self.o_proj(out.reshape(batch, length, -1)), cache


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)) (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        if config.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act={config.hidden_act!r} must be one of {list(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[config.hidden_act]

        def linear(fan_in, fan_out):
            return nnx.Linear(
                fan_in,
                fan_out,
                use_bias=config.mlp_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x):
        """Map [..., hidden] to [..., hidden]."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """A pre-norm decoder block."""

    def __init__(self, config: ModelConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.input_layernorm = rms_norm(config, **kinds)
        self.self_attn = Attention(config, **kinds)
        self.post_attention_layernorm = rms_norm(config, **kinds)
        self.mlp = GatedMLP(config, **kinds)

    def __call__(self, x, rope, mask, cache: KVCache | None, layer):
        """Map the stream x [B, T, hidden] to (x, cache).

        Args:
            rope: cosines and sines as `rope.rotation` returns them.
            mask: bool [B, 1, T, slots], True where a query sees a slot; None is plain causal.
            cache: written at `layer`, or None to attend within x alone.
        """
        attended, cache = self.self_attn(self.input_layernorm(x), rope, mask, cache, layer)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache
