"""append_attention on Pallas-Triton: the kernel of `decode_attention`, which is given a new token.

Each program rotates what it needs by itself. The one whose tiles the new slot is in writes it; no
other reads that slot.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.decode_attention import triton

MAX_TILE = 8192  # elements of A for a head, and of the heads' parts: 64 a thread


def append_attention(
    qkv, k, v, mask, length, cos, sin, a=None, *, factor=1.0, scale, layer=None, interpret=False
):
    """See `pallas_kernels.append_attention`. `interpret` runs the kernel's jnp on any device."""
    arrays, new = (qkv, k, v, mask, length), triton.NewToken(cos, sin, a, factor)
    return triton.attend(*arrays, new, scale=scale, layer=layer, interpret=interpret)


def unsupported(
    qkv, k, v, mask, length, cos, sin, a=None, *, factor=1.0, scale, layer=None
) -> str | None:
    """Why these arguments cannot run, or None."""
    if k.shape[-1] % 2:
        return f"head_dim is {k.shape[-1]}; pairs are rotated"
    if cos.dtype != jnp.float32 or sin.dtype != jnp.float32:
        return f"cos is {cos.dtype} and sin {sin.dtype}; the kernel reads float32"
    if a is not None:
        heads, rank = qkv.shape[1] - 2 * k.shape[-3], a.shape[-2]
        tile = pl.next_power_of_2(rank) * pl.next_power_of_2(max(heads, k.shape[-1]))
        if tile > MAX_TILE:
            return f"rank {rank} and {heads} heads of {k.shape[-1]} are too much for the registers"
    queries = jax.ShapeDtypeStruct(
        (len(qkv), qkv.shape[1] - 2 * k.shape[-3], k.shape[-1]), qkv.dtype
    )
    return triton.unsupported(queries, k, v, mask, length, scale=scale, layer=layer)
