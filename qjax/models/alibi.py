"""ALiBi: attention logits fall linearly with distance (arXiv:2108.12409)."""

import jax
import jax.numpy as jnp
import numpy as np


def slopes(heads: int) -> np.ndarray:
    """Return the float32 [heads] slopes: 2**(-8 / n), its powers, for n a power of two.

    For other numbers of heads every second slope of the next power of two follows.
    """
    power = 1 << (heads.bit_length() - 1)
    first = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    more = 2.0 ** (-8.0 / (2 * power) * np.arange(1, 2 * (heads - power), 2))
    return np.concatenate([first, more]).astype(np.float32)


def alibi(heads: int, key_order: jax.Array) -> jax.Array:
    """Return the float32 bias [B, heads, 1, S] of keys at int32 places [B, S] among real tokens.

    It rises with the key's place; the softmax over keys does not see that the query's is missing.
    """
    places = key_order.astype(jnp.float32)[:, None, None, :]
    return places * jnp.asarray(slopes(heads))[None, :, None, None]
