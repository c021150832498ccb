"""T5's relative position bias: a learned logit per head for each bucket of distances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class RelativeBias(nnx.Module):
    """Biases of attention logits by the distance of query and key (arXiv:1910.10683, section 2.1).

    Half of the buckets hold one small distance each, the others ever longer ranges of them up to
    `max_distance`; an encoder has one such set for each direction.
    """

    def __init__(self, heads, buckets, max_distance, *, both_ways, dtype, param_dtype, rngs):
        self.table = nnx.Embed(buckets, heads, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.buckets, self.max_distance, self.both_ways = buckets, max_distance, both_ways

    def __call__(self, distance: jax.Array) -> jax.Array:
        """Map distances int32 [B, T, S], of queries behind keys, to float32 [B, heads, T, S]."""
        count = self.buckets // 2 if self.both_ways else self.buckets
        bucket_of = jnp.asarray(bucket_table(count, self.max_distance))
        size = jnp.abs(distance) if self.both_ways else jnp.maximum(distance, 0)
        bucket = bucket_of[jnp.minimum(size, self.max_distance)]
        if self.both_ways:
            bucket = bucket + jnp.where(distance < 0, count, 0)
        return jnp.moveaxis(self.table(bucket).astype(jnp.float32), -1, 1)


@functools.cache
def bucket_table(count: int, max_distance: int) -> np.ndarray:
    """Return the int32 bucket of each distance up to `max_distance`, the last for all beyond."""
    distance = np.arange(max_distance + 1, dtype=np.float32)
    exact = count // 2
    log = np.log(np.maximum(distance, 1) / np.float32(exact))
    steps = log / np.float32(np.log(max_distance / exact)) * np.float32(count - exact)
    wide = np.minimum(exact + steps.astype(np.int32), count - 1)
    return np.where(distance < exact, distance.astype(np.int32), wide).astype(np.int32)
