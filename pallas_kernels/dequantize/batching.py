"""dequantize under `jax.vmap`: one slice after another where a kernel would not reach all of them.

Pallas' own rule adds an axis to each array, and Triton counts the elements of all slices together.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.reach import out_of_reach
from pallas_kernels.scales import taken_apart


def with_vmap(decode: Callable[..., jax.Array], packed, scales, codebook, layer) -> jax.Array:
    """Return `decode(packed, scales, codebook, layer)`, with a rule for vmap."""
    arrays, rebuild = taken_apart(scales)
    given = () if layer is None else (layer,)

    def one(packed, arrays, codebook, given):
        return decode(packed, rebuild(arrays), codebook, *(given or (None,)))

    return _guarded(one)(packed, arrays, codebook, given)


def _guarded(decode: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    call = jax.custom_batching.custom_vmap(decode)

    @call.def_vmap
    def _(size, batched, *operands):
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(batched))
        if out_of_reach("packed", operands[0].size, operands[0].dtype.itemsize) is None:
            return _guarded(jax.vmap(decode, in_axes=axes))(*operands), True

        def slice_of(i):
            return call(*jax.tree.map(lambda a, b: a[i] if b else a, operands, tuple(batched)))

        return jax.lax.map(slice_of, jnp.arange(size)), True

    return call
