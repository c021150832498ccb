"""append_attention in plain jnp."""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention import xla


def append_attention(qkv, k, v, mask, length, cos, sin, a=None, *, factor=1.0, scale, layer=None):
    """See `pallas_kernels.append_attention`."""
    kv_heads = k.shape[-3]
    queries, key, value = jnp.split(qkv, [-2 * kv_heads, -kv_heads], axis=1)
    k, v = (
        _write(held, new, length, layer) for held, new in ((k, _rotate(key, cos, sin)), (v, value))
    )
    out = xla.decode_attention(
        _rotate(queries, cos, sin), k, v, mask, length, scale=scale, layer=layer
    )
    if a is None:
        return out, None, k, v
    if layer is not None:
        a = jax.lax.dynamic_index_in_dim(a, layer, keepdims=False)
    flat = out.reshape(len(out), -1)
    hidden = factor * jnp.matmul(flat, a.T, preferred_element_type=jnp.float32)
    return out, hidden.astype(out.dtype), k, v


def _rotate(x, cos, sin):
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _write(held, new, length, layer):
    new = new[:, :, None].astype(held.dtype)
    zero, slot = jnp.int32(0), jnp.asarray(length, jnp.int32) - 1
    if layer is None:
        return jax.lax.dynamic_update_slice(held, new, (zero, zero, slot, zero))
    start = (jnp.asarray(layer, jnp.int32), zero, zero, slot, zero)
    return jax.lax.dynamic_update_slice(held, new[None], start)


def unsupported(*args, **options) -> None:
    """It runs everywhere."""
