"""The matmul kernels under `jax.vmap`: its own rule for a Mosaic kernel fails for most bodies.

A batch of x alone is more rows of x. A batch of weights (experts) is a stack: one launch for each,
which reads its layer in place.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.scales import DoubleQuantScales

_STACKED = 3  # of the arrays of double-quantized scales: codes, absmax and offset


def with_vmap(product: Callable[..., jax.Array], x, packed, scales, codebook, layer) -> jax.Array:
    """Return `product(x, packed, scales, codebook, layer)`, with a rule for vmap."""
    double = isinstance(scales, DoubleQuantScales)
    arrays = tuple(a for a in scales[:5] if a is not None) if double else (scales,)

    def rebuild(arrays):
        return DoubleQuantScales(*arrays, pitch=scales.pitch) if double else arrays[0]

    @jax.custom_batching.custom_vmap
    def call(x, packed, arrays, codebook, layer):
        return product(x, packed, rebuild(arrays), codebook, layer[0] if layer else None)

    @call.def_vmap
    def _(size, batched, x, packed, arrays, codebook, layer):
        # Outside a trace NumPy arrays come as they are, and cannot be indexed by a tracer.
        x, packed, arrays, layer = jax.tree.map(jnp.asarray, (x, packed, arrays, layer))
        x_batched, *weight_batched = batched
        if not any(jax.tree.leaves(weight_batched)):
            y = call(x.reshape(-1, x.shape[-1]), packed, arrays, codebook, layer)
            return y.reshape(*x.shape[:2], y.shape[-1]), True
        packed_batched, arrays_batched, codebook_batched, layer_batched = weight_batched
        count = _STACKED if double else 1
        shared = codebook_batched, arrays_batched[count:]
        if any(jax.tree.leaves(shared)):
            raise NotImplementedError("vmap of the matmul kernels shares one codebook and table")

        def stack(a, is_batched):
            """Every layer of every element of the batch, in one leading axis."""
            a = a if is_batched else jnp.broadcast_to(a, (size, *a.shape))
            return a.reshape(-1, *a.shape[2:]) if layer else a

        depth = packed.shape[1 if packed_batched else 0] if layer else 1
        stacked = stack(packed, packed_batched)
        flags = zip(arrays[:count], arrays_batched[:count], strict=True)
        stacked_arrays = (*(stack(a, b) for a, b in flags), *arrays[count:])

        def one(i):
            here = jnp.int32(0)
            if layer:
                here = layer[0][i] if layer_batched[0] else layer[0]
            return call(
                x[i] if x_batched else x,
                stacked,
                stacked_arrays,
                codebook,
                (i * depth + here,),
            )

        return jax.lax.map(one, jnp.arange(size, dtype=jnp.int32)), True

    given = () if layer is None else (jnp.asarray(layer, jnp.int32),)
    return call(x, packed, arrays, codebook, given)
