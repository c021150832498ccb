"""A mixture of experts: a router, and MLPs whose kernels are stacked [experts, in, out].

For few tokens the kernels of the experts that each was sent to are gathered (the packed bytes, of
4-bit ones) and they alone are computed. For many every expert is computed for every token and
weighed, with zero for those that the router did not choose: one batched product per kernel. Both
are of static shape.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.models.config import ExpertsConfig, ModelConfig
from qjax.models.mlp import activation


class MixtureMLP(nnx.Module):
    """The weighted sum of the MLPs of the experts that a token is sent to (arXiv:2401.04088)."""

    def __init__(
        self, config: ModelConfig, experts: ExpertsConfig, *, dtype, param_dtype, rngs: nnx.Rngs
    ):
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = experts
        self.router = nnx.Linear(
            config.hidden_size, experts.count, use_bias=experts.clamped, **kinds
        )
        self.experts = Experts(config, experts, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., hidden] to the same."""
        tokens = x.reshape(-1, x.shape[-1])
        logits, chosen = jax.lax.top_k(
            self.router(tokens).astype(jnp.float32), self.config.per_token
        )
        share = jax.nn.softmax(logits, axis=-1)  # [tokens, per_token]
        # Gathering is a copy: measured on a CPU, in 4 bits, it pays up to half of the experts.
        few = 2 * chosen.size <= self.config.count
        out = (self._chosen if few else self._every)(tokens, chosen, share)
        return out.astype(x.dtype).reshape(x.shape)

    def _chosen(self, tokens: jax.Array, chosen: jax.Array, share: jax.Array) -> jax.Array:
        """Compute each token by its own experts: float32 [tokens, hidden]."""
        graphdef, streams, weights = nnx.split(self.experts, nnx.RngState, ...)
        rows = chosen.reshape(-1)
        gathered = jax.tree.map(lambda leaf: leaf[rows], weights)
        experts = nnx.merge(graphdef, streams, gathered)
        for layer in experts.layers:  # Flax takes the shape of the bias from here
            layer.kernel_shape = (rows.size, *layer.kernel_shape[1:])
        out = experts(jnp.repeat(tokens, self.config.per_token, axis=0)[:, None])
        nnx.update(self.experts, nnx.state(experts, nnx.RngState))
        out = out.reshape(*chosen.shape, -1).astype(jnp.float32)
        return jnp.einsum("nk,nkd->nd", share, out, preferred_element_type=jnp.float32)

    def _every(self, tokens: jax.Array, chosen: jax.Array, share: jax.Array) -> jax.Array:
        """Compute each token by all experts: float32 [tokens, hidden]."""
        one_hot = jax.nn.one_hot(chosen, self.config.count, dtype=jnp.float32)
        weights = jnp.einsum("nk,nke->ne", share, one_hot).astype(tokens.dtype)
        out = self.experts(jnp.broadcast_to(tokens, (self.config.count, *tokens.shape)))
        return jnp.einsum("ne,end->nd", weights, out, preferred_element_type=jnp.float32)


class Experts(nnx.Module):
    """The MLPs of all experts, or of some: as many as the kernels are stacked."""

    def __init__(
        self, config: ModelConfig, experts: ExpertsConfig, *, dtype, param_dtype, rngs: nnx.Rngs
    ):
        self.config = experts
        self.activation = activation(config.hidden_act)
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        count, hidden, inner = experts.count, config.hidden_size, config.intermediate_size

        def linear(fan_in, fan_out):
            bias = (count, fan_out) if experts.clamped else None
            return nnx.Einsum("end,edf->enf", (count, fan_in, fan_out), bias, **kinds)

        if experts.clamped:
            self.gate_up_proj = linear(hidden, 2 * inner)
        else:
            self.gate_proj = linear(hidden, inner)
            self.up_proj = linear(hidden, inner)
        self.down_proj = linear(inner, hidden)

    @property
    def layers(self) -> list[nnx.Einsum]:
        """Its linear layers."""
        return [layer for layer in vars(self).values() if isinstance(layer, nnx.Einsum)]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [experts, tokens, hidden] to the same, each expert its own tokens."""
        if not self.config.clamped:
            return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        gate_up = self.gate_up_proj(x)
        gate = jnp.minimum(gate_up[..., ::2], self.config.limit)
        up = jnp.clip(gate_up[..., 1::2], -self.config.limit, self.config.limit)
        return self.down_proj((up + 1) * gate * jax.nn.sigmoid(gate * self.config.alpha))
