"""append_attention on Pallas-Triton: the kernel of `decode_attention`, which is given a new token.

Each program rotates what it needs by itself. The one whose tiles the new slot is in writes it; no
other reads that slot.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention import triton


def append_attention(qkv, k, v, mask, length, cos, sin, *, scale, layer=None, interpret=False):
    """See `pallas_kernels.append_attention`. `interpret` runs the kernel's jnp on any device."""
    return triton.attend(
        qkv, k, v, mask, length, (cos, sin), scale=scale, layer=layer, interpret=interpret
    )


def unsupported(qkv, k, v, mask, length, cos, sin, *, scale, layer=None) -> str | None:
    """Why these arguments cannot run, or None."""
    if k.shape[-1] % 2:
        return f"head_dim is {k.shape[-1]}; pairs are rotated"
    if cos.dtype != jnp.float32 or sin.dtype != jnp.float32:
        return f"cos is {cos.dtype} and sin {sin.dtype}; the kernel reads float32"
    queries = jax.ShapeDtypeStruct(
        (len(qkv), qkv.shape[1] - 2 * k.shape[-3], k.shape[-1]), qkv.dtype
    )
    return triton.unsupported(queries, k, v, mask, length, scale=scale, layer=layer)
