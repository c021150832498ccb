"""decode_attention as sums that read k and v once, as they lie.

Written as products they would be batched over heads, and k and v transposed for it.
"""

import jax
import jax.numpy as jnp


def decode_attention(q, k, v, mask, length, *, scale, layer=None):
    """See `pallas_kernels.decode_attention`."""
    del length  # `mask` says it
    if layer is not None:
        k, v = (jax.lax.dynamic_index_in_dim(x, layer, axis=0, keepdims=False) for x in (k, v))
    batch, kv_heads, _, head_dim = k.shape
    queries = q.reshape(batch, kv_heads, -1, 1, head_dim).astype(jnp.float32)
    keys, values = (x[:, :, None].astype(jnp.float32) for x in (k, v))
    logits = jnp.sum(queries * keys, axis=-1) * scale  # [batch, kv_heads, group, slots]
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.sum(weights[..., None] * values, axis=3).reshape(q.shape).astype(q.dtype)


def unsupported(q, k, v, mask, length, *, scale, layer=None) -> str | None:
    """It runs everywhere."""
