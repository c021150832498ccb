"""adapted_matmul: a product with a 4-bit weight, and what is added to it, for few rows."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.check import check_weight
from pallas_kernels.scales import DoubleQuantScales


def adapted_matmul(
    x: jax.Array,
    packed: jax.Array,
    scales: jax.Array | DoubleQuantScales,
    codebook: jax.Array,
    adapter: tuple[jax.Array, jax.Array] | None = None,
    residual: jax.Array | None = None,
    *,
    block_size: int,
    sections: tuple[int, ...] | None = None,
    layer: jax.Array | int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Return x @ W.T + hidden @ B.T + residual, summed in float32 and rounded once in a kernel.

    Args:
        x: float [M, K].
        packed, scales, codebook, block_size: the weight W [N, K], as `matmul` takes it.
        adapter: hidden [M, sections * rank] and B [N, rank] in x's dtype, or None.
        residual: [M, N] in x's dtype, or None.
        sections: rows of W that meet the first `rank` columns of hidden, those that meet the next,
            and so on; None for one section.
        layer: int scalar, the layer of a stack that W and B are read from, without a copy.
        implementation: None for the fastest that can run; "xla" or "mosaic_gpu".

    Returns:
        x's dtype, [M, N].

    Raises:
        ValueError: shapes that do not fit, or an unknown implementation.
        NotImplementedError: the named implementation cannot run here.

    Example:
        >>> packed = jnp.full((1, 32), 0xFF, jnp.uint8)
        >>> weight = packed, jnp.ones((1, 1)), jnp.linspace(-1, 1, 16)
        >>> adapter = jnp.ones((1, 2)), jnp.ones((1, 2))
        >>> adapted_matmul(jnp.ones((1, 64)), *weight, adapter, block_size=64)
        Array([[66.]], dtype=float32)
    """
    n, k = check_weight(packed, scales, codebook, block_size, layer)
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"x must be [M, K] = [M, {k}] and has shape {x.shape}")
    if adapter is not None:
        sections = sections or (n,)
        _check_adapter(x, adapter, sections, n, layer)
    if residual is not None and (residual.shape, residual.dtype) != ((len(x), n), x.dtype):
        raise ValueError(f"residual must be {x.dtype}{[len(x), n]} and is {jax.typeof(residual)}")

    double = isinstance(scales, DoubleQuantScales)
    pitch = scales.pitch if double else None

    # Its kernels have no rule for vmap: one call after another.
    @jax.custom_batching.sequential_vmap
    def call(x, packed, scales, codebook, adapter, residual, layer):
        if isinstance(scales, DoubleQuantScales):
            scales = scales._replace(pitch=pitch)
        arrays = x, packed, scales, codebook, adapter, residual
        how = {"block_size": block_size, "sections": sections, "layer": layer}
        return dispatch.run("adapted_matmul", implementation, *arrays, **how)

    arrays = scales._replace(pitch=None) if double else scales
    return call(x, packed, arrays, codebook, adapter, residual, layer)


def _check_adapter(x, adapter, sections, n, layer) -> None:
    hidden, b = adapter
    rank = b.shape[-1]
    if b.ndim != (2 if layer is None else 3) or b.shape[-2] != n:
        lead = [] if layer is None else ["L"]
        raise ValueError(f"adapter's B must be {[*lead, n, 'rank']} and has shape {b.shape}")
    if sum(sections) != n:
        raise ValueError(f"sections {sections} must sum up to the {n} rows of W")
    if hidden.shape != (len(x), len(sections) * rank):
        raise ValueError(
            f"adapter's hidden must be {[len(x), len(sections) * rank]} "
            f"({len(sections)} sections of rank {rank}) and has shape {hidden.shape}"
        )
    if not x.dtype == hidden.dtype == b.dtype:
        raise ValueError(f"adapter must have x's dtype, {x.dtype}: {hidden.dtype} and {b.dtype}")
