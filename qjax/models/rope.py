"""Rotary position embeddings (arXiv:2104.09864), half-rotation layout as in Hugging Face's Llama.

Element `i` of a head is paired with element `i + head_dim / 2`. (llama.cpp and Meta's own files
pair neighbours; their loaders permute the query and key weights.)
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from qjax.models.config import RopeConfig


def frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Return the float32 [head_dim / 2] angles per position, in radians."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freqs = 1.0 / np.float32(config.theta) ** exponents
    if config.kind == "linear":
        return freqs / np.float32(config.factor)
    if config.kind == "llama3":
        return _llama3(freqs, config)
    if config.kind == "factors":
        if len(config.factors) != len(freqs):
            raise ValueError(
                f"rope factors has {len(config.factors)} entries, "
                f"head_dim={head_dim} needs {len(freqs)}"
            )
        return freqs / np.asarray(config.factors, np.float32)
    if config.kind != "default":
        raise ValueError(f"rope kind={config.kind!r} must be default, linear, llama3 or factors")
    return freqs


def _llama3(freqs: np.ndarray, config: RopeConfig) -> np.ndarray:
    """Divide long wavelengths by `factor`, keep short ones, blend those between (Llama 3.1)."""
    wavelengths = 2 * math.pi / freqs
    low, high = config.low_freq_factor, config.high_freq_factor
    kept = np.clip((config.original_length / wavelengths - low) / (high - low), 0.0, 1.0)
    return ((1 - kept) * freqs / config.factor + kept * freqs).astype(np.float32)


def rotation(
    config: RopeConfig, head_dim: int, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return float32 cosines and sines [B, T, 1, head_dim / 2] of int32 positions [B, T]."""
    freqs = jnp.asarray(frequencies(config, head_dim))
    angles = positions.astype(jnp.float32)[:, :, None, None] * freqs[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [B, T, heads, head_dim] by `rotation`'s angles, in float32; x's dtype comes back."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
