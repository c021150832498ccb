"""Norms: nnx.LayerNorm, and an RMSNorm whose scale may be 1 + its parameter (Gemma)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.models.config import ModelConfig


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x**2) + epsilon) * scale over the last axis, in float32 (arXiv:1910.07467).

    Args:
        offset: the factor is `offset + scale`.
        dtype: of the result.
    """

    def __init__(self, features: int, *, epsilon: float, offset: float = 0.0, dtype, param_dtype):
        start = jnp.zeros if offset else jnp.ones
        self.scale = nnx.Param(start((features,), param_dtype))
        self.epsilon, self.offset, self.dtype = epsilon, offset, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize [..., features]."""
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        scale = self.scale[...].astype(jnp.float32) + self.offset
        return (x * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.dtype)


def make_norm(config: ModelConfig, features: int, *, dtype, param_dtype, rngs: nnx.Rngs):
    """Return the kind of norm that the config asks for."""
    kinds: dict[str, Any] = {"epsilon": config.norm_eps, "dtype": dtype, "param_dtype": param_dtype}
    if config.norm == "layer":
        # The fast variance, E[x^2] - E[x]^2, cancels where the mean is large.
        return nnx.LayerNorm(features, use_fast_variance=False, **kinds, rngs=rngs)
    return RMSNorm(features, offset=float(config.norm == "rms_offset"), **kinds)
