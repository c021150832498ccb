"""decode_attention as sums that read k and v once, as they lie.

Written as products they would be batched over heads, and k and v transposed for it.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.packed import Packed, count_heads, take_layer


def decode_attention(q, k, v, mask, length, *, scale, layer=None):
    """See `pallas_kernels.decode_attention`."""
    del length  # `mask` says it
    k, v = jax.tree.map(lambda held: take_layer(held, layer), (k, v))
    (batch, slots), kv_heads, head_dim = mask.shape, count_heads(k), q.shape[-1]
    if isinstance(k, Packed):
        k, v = (x.decode().reshape(batch, kv_heads, -1, head_dim)[:, :, :slots] for x in (k, v))
    queries = q.reshape(batch, kv_heads, -1, 1, head_dim).astype(jnp.float32)
    keys, values = (x[:, :, None].astype(jnp.float32) for x in (k, v))
    logits = jnp.sum(queries * keys, axis=-1) * scale  # [batch, kv_heads, group, slots]
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.sum(weights[..., None] * values, axis=3).reshape(q.shape).astype(q.dtype)


def unsupported(q, k, v, mask, length, *, scale, layer=None) -> str | None:
    """It runs everywhere."""
