"""The feed-forward half of a block."""

import functools
from collections.abc import Callable

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from qjax.models.config import ModelConfig
from qjax.models.step_linear import Gated, linear

_gelu = functools.partial(nnx.gelu, approximate=False)
# By Hugging Face's names; several stand for the tanh approximation of GELU.
ACTIVATIONS = {
    "silu": nnx.silu,
    "relu": nnx.relu,
    "gelu": _gelu,
    "gelu_new": nnx.gelu,
    "gelu_fast": nnx.gelu,
    "gelu_pytorch_tanh": nnx.gelu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Look up an activation by Hugging Face's name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act={name!r} must be one of {list(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class MLP(nnx.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) * up(x)) (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        self.activation = activation(config.hidden_act)
        self.kind = config.mlp
        linear = functools.partial(
            nnx.Linear, use_bias=config.mlp_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        hidden, inner = config.hidden_size, config.intermediate_size
        if config.mlp == "gated_fused":
            self.gate_up_proj = linear(hidden, 2 * inner)
        else:
            if config.mlp == "gated":
                self.gate_proj = linear(hidden, inner)
            self.up_proj = linear(hidden, inner)
        self.down_proj = linear(inner, hidden)

    def foldings(self) -> dict[str, tuple[str, ...]]:
        """See `Pretrained.foldings`: `up` is a factor of what `down` gets, or has ReLU alone."""
        keeps = self.kind == "gated" or (self.kind == "plain" and self.activation is nnx.relu)
        return {"up_proj": ("down_proj/kernel",)} if keeps else {}

    def __call__(self, x: jax.Array, norm=None, residual=None, step: bool = False) -> jax.Array:
        """Map [..., hidden] to the same.

        Args:
            norm: applied to x first.
            residual: added to the result.
            step: see `is_step`.
        """
        before = None
        if self.kind == "gated_fused":
            inner = linear(self.gate_up_proj, x, before=norm, step=step)
            inner, before = checkpoint_name(inner, "gate_up"), Gated(self.activation)
        else:
            if not step and norm is not None:  # once; in a step each product has it in a kernel
                x, norm = norm(x), None
            first = self.gate_proj if self.kind == "gated" else self.up_proj
            inner = linear(first, x, before=norm, step=step)
            inner = self.activation(checkpoint_name(inner, "gate_up"))
            if self.kind == "gated":
                up = linear(self.up_proj, x, before=norm, step=step)
                inner = inner * checkpoint_name(up, "gate_up")
        return linear(self.down_proj, inner, before=before, residual=residual, step=step)
