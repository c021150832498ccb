"""One transformer block: attention and an MLP, each added to the stream.

The blocks are made of plain `nnx.Linear` and `nnx.Einsum`, called as functions, so that any layer
of the same call (a quantized one, one with an adapter) can stand in their place.
"""

from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from qjax.models.attention import Attention
from qjax.models.cache import KVCache
from qjax.models.config import ModelConfig
from qjax.models.context import Context
from qjax.models.experts import MixtureMLP
from qjax.models.mlp import MLP
from qjax.models.norm import make_norm
from qjax.models.step_linear import is_step

# What reads the input of each half.
_OF_ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj")
_OF_MLP = ("gate_proj", "up_proj", "gate_up_proj")


class Block(nnx.Module):
    """A block, with its norms where `config.block` says."""

    def __init__(self, config: ModelConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.kind = config.block
        self.input_layernorm = make_norm(config, config.hidden_size, **kinds)
        self.self_attn = Attention(config, **kinds)
        self.post_attention_layernorm = make_norm(config, config.hidden_size, **kinds)
        if config.experts is None:
            self.mlp = MLP(config, **kinds)
        else:
            self.mlp = MixtureMLP(config, config.experts, **kinds)
        if config.block == "sandwich":
            self.pre_feedforward_layernorm = make_norm(config, config.hidden_size, **kinds)
            self.post_feedforward_layernorm = make_norm(config, config.hidden_size, **kinds)

    def foldings(self) -> dict[str, tuple[str, ...]]:
        """See `Pretrained.foldings`: norms in front of a half, read by nothing else."""
        if self.kind == "post":
            return {}
        found = {"input_layernorm": _kernels(self.self_attn, "self_attn", _OF_ATTENTION)}
        if isinstance(self.mlp, MLP):
            norm = "pre_feedforward" if self.kind == "sandwich" else "post_attention"
            found[f"{norm}_layernorm"] = _kernels(self.mlp, "mlp", _OF_MLP)
        return found

    def __call__(
        self, x: jax.Array, context: Context, cache: KVCache | None, layer
    ) -> tuple[jax.Array, KVCache | None]:
        """Map the stream x [B, T, hidden] to (x, cache).

        Args:
            context: of this kind of layer.
            cache: written at `layer`, or None to attend within x alone.
        """
        if self.kind == "pre":
            x, cache = self.self_attn(
                x, context, cache, layer, norm=self.input_layernorm, residual=x
            )
            return self._feed(checkpoint_name(x, "stream"), is_step(x, cache)), cache
        normed = x if self.kind == "post" else self.input_layernorm(x)
        attended, cache = self.self_attn(normed, context, cache, layer)
        if self.kind == "post":
            x = checkpoint_name(self.input_layernorm(x + attended), "stream")
            x = self.post_attention_layernorm(x + self.mlp(x))
        elif self.kind == "sandwich":
            x = checkpoint_name(x + self.post_attention_layernorm(attended), "stream")
            fed = self.mlp(self.pre_feedforward_layernorm(x))
            x = x + self.post_feedforward_layernorm(fed)
        else:
            x = x + attended + self.mlp(self.post_attention_layernorm(x))
        return x, cache

    def _feed(self, x: jax.Array, step: bool) -> jax.Array:
        """The second half of a block of kind "pre"."""
        norm = self.post_attention_layernorm
        if isinstance(self.mlp, MLP):
            return self.mlp(x, norm=norm, residual=x, step=step)
        return x + self.mlp(norm(x))


def _kernels(half: nnx.Module, name: str, layers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}/{layer}/kernel" for layer in layers if hasattr(half, layer))
