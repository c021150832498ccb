"""adapted_matmul as the fastest matmul, with the rest added by XLA."""

import itertools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch


def adapted_matmul(
    x, packed, scales, codebook, adapter=None, residual=None, *, block_size, sections, layer=None
):
    """See `pallas_kernels.adapted_matmul`."""
    weight = packed, scales, codebook
    how = {"block_size": block_size, "layer": layer}
    total = dispatch.run("matmul", None, x, *weight, **how).astype(jnp.float32)
    if adapter is not None:
        hidden, b = adapter
        total = total + low_rank(hidden, b, sections, layer)
    if residual is not None:
        total = total + residual.astype(jnp.float32)
    return total.astype(x.dtype)


def low_rank(hidden, b, sections, layer=None) -> jax.Array:
    """Return hidden @ B.T, float32 [M, N], each section of B's rows with its part of hidden."""
    if layer is not None:
        b = jax.lax.dynamic_index_in_dim(b, layer, keepdims=False)
    rank = b.shape[1]
    ends = list(itertools.accumulate(sections, initial=0))
    parts = [
        jnp.matmul(
            hidden[:, i * rank : (i + 1) * rank],
            b[start:end].T,
            preferred_element_type=jnp.float32,
        )
        for i, (start, end) in enumerate(itertools.pairwise(ends))
    ]
    return jnp.concatenate(parts, axis=1)


def unsupported(*args, **options) -> None:
    """It runs everywhere."""
