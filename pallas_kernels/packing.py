"""Two 4-bit codes a byte, the first in the high nibble: the one definition of the packed layout.

This is bitsandbytes' order. A row of K codes is K // 2 bytes; byte i holds code 2i in bits 7..4 and
code 2i + 1 in bits 3..0.
"""

import functools

import jax
import jax.numpy as jnp


def pack(codes: jax.Array) -> jax.Array:
    """Pack uint8 codes [..., K] (values 0 to 15, K even) into uint8 [..., K // 2]."""
    return (codes[..., 0::2] << 4) | codes[..., 1::2]


@functools.partial(jax.jit, inline=True)  # one program where it is called eagerly
def unpack(packed: jax.Array) -> jax.Array:
    """Unpack uint8 [..., K // 2] into uint8 codes [..., K].

    Each byte stands in two places and gives the nibble of the place: XLA fuses that with what
    follows, where it would write a stack of the two nibbles out first.
    """
    shape = *packed.shape[:-1], 2 * packed.shape[-1]
    twice = jnp.broadcast_to(packed[..., None], (*packed.shape, 2)).reshape(shape)
    even = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) % 2 == 0
    return jnp.where(even, twice >> 4, twice & 15)
