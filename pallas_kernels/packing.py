"""Two 4-bit codes a byte, the first in the high nibble: the one definition of the packed layout.

This is bitsandbytes' order. A row of K codes is K // 2 bytes; byte i holds code 2i in bits 7..4 and
code 2i + 1 in bits 3..0.
"""

import jax
import jax.numpy as jnp


def pack(codes: jax.Array) -> jax.Array:
    """Pack uint8 codes [..., K] (values 0 to 15, K even) into uint8 [..., K // 2]."""
    return (codes[..., 0::2] << 4) | codes[..., 1::2]


def unpack(packed: jax.Array) -> jax.Array:
    """Unpack uint8 [..., K // 2] into uint8 codes [..., K]."""
    pairs = jnp.stack([packed >> 4, packed & 15], axis=-1)
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])
