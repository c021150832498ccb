"""Rotary position embeddings (arXiv:2104.09864), half-rotation layout as in Hugging Face's Llama.

Element `i` of a head is paired with element `i + rotary_dim / 2`. (llama.cpp and Meta's own files
pair neighbours; their loaders permute the query and key weights.)
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from qjax.models.config import RopeConfig


def frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Return the float32 [rotary_dim / 2] angles per position, in radians."""
    dim = int(head_dim * config.partial)
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    freqs = 1.0 / np.float32(config.theta) ** exponents
    if config.kind == "linear":
        return freqs / np.float32(config.factor)
    if config.kind == "llama3":
        return _llama3(freqs, config)
    if config.kind == "yarn":
        return _yarn(freqs, config)
    if config.kind == "longrope":
        return freqs / np.asarray(config.factors, np.float32)
    return freqs


def _llama3(freqs: np.ndarray, config: RopeConfig) -> np.ndarray:
    """Divide long wavelengths by `factor`, keep short ones, blend those between (Llama 3.1)."""
    wavelengths = 2 * math.pi / freqs
    low, high = config.low_freq_factor, config.high_freq_factor
    kept = np.clip((config.original_length / wavelengths - low) / (high - low), 0.0, 1.0)
    return ((1 - kept) * freqs / config.factor + kept * freqs).astype(np.float32)


def _yarn(freqs: np.ndarray, config: RopeConfig) -> np.ndarray:
    """Keep the frequencies that turn often in the original length, divide those that hardly do."""
    dim = 2 * len(freqs)

    def index(turns: float) -> float:
        """Return the place of the frequency that turns so often in the original length."""
        wavelength = config.original_length / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(config.theta))

    first, last = index(config.beta_fast), index(config.beta_slow)
    if config.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    ramp = (np.arange(len(freqs)) - first) / max(last - first, 0.001)
    kept = 1 - np.clip(ramp, 0.0, 1.0)
    return ((1 - kept) * freqs / config.factor + kept * freqs).astype(np.float32)


def _magnitude(config: RopeConfig) -> float:
    if config.kind not in ("yarn", "longrope"):
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    if config.factor <= 1:
        return 1.0
    if config.kind == "yarn":
        return 0.1 * math.log(config.factor) + 1
    return math.sqrt(1 + math.log(config.factor) / math.log(config.original_length))


def rotation(
    config: RopeConfig, head_dim: int, positions: jax.Array, longest: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return float32 cosines and sines [B, T, 1, rotary_dim / 2] of int32 positions [B, T].

    Args:
        longest: tokens that the text may come to have, which chooses among the frequencies of
            "longrope"; None: those up to the last position.
    """
    freqs = jnp.asarray(frequencies(config, head_dim))
    if config.kind == "longrope":
        stretched = dataclasses.replace(config, factors=config.long_factors)
        is_long = (jnp.max(positions) + 1 if longest is None else longest) > config.original_length
        freqs = jnp.where(is_long, jnp.asarray(frequencies(stretched, head_dim)), freqs)
    angles = positions.astype(jnp.float32)[:, :, None, None] * freqs[None, None, None, :]
    size = _magnitude(config)
    return jnp.cos(angles) * size, jnp.sin(angles) * size


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the first elements of each head of x [B, T, heads, head_dim] by `rotation`'s angles.

    Computed in float32, returned in x's dtype.
    """
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
