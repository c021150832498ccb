"""quantize: floating-point weights to 4-bit codes and block scales."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.check import check_block_size


def quantize(
    w: jax.Array,
    codebook: np.ndarray,
    *,
    block_size: int,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Encode the rows of a weight in 4 bits, one scale a block: bitsandbytes' encoder, bit for bit.

    Every implementation gives the same bits.

    Args:
        w: float [N, K].
        codebook: float32 [16], a concrete array: the value of each code.
        block_size: consecutive weights of a row that share a scale; it divides K.
        implementation: None for the fastest that can run; "xla", "mosaic_gpu" or "triton".

    Returns:
        packed uint8 [N, K // 2], high nibble first, and absmax float32 [N, K // block_size].

    Raises:
        ValueError: shapes that do not fit, or an unknown implementation.
        NotImplementedError: the named implementation cannot run here.

    Example:
        >>> codebook = np.linspace(-1, 1, 16, dtype=np.float32)
        >>> packed, absmax = quantize(jnp.full((1, 64), 2.0), codebook, block_size=64)
        >>> packed[0, 0], absmax[0]
        (Array(255, dtype=uint8), Array([2.], dtype=float32))

    Source: Dettmers et al., QLoRA (arXiv 2305.14314), section 3.
    """
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"w must be floating point and is {w.dtype}")
    if w.ndim != 2 or w.size == 0:
        raise ValueError(f"w must be [N, K], not empty, and has shape {w.shape}")
    codebook = np.asarray(codebook, np.float32)
    if codebook.shape != (16,):
        raise ValueError(f"codebook must have 16 entries and has shape {codebook.shape}")
    check_block_size(block_size, w.shape[1])
    return dispatch.run("quantize", implementation, w, codebook, block_size=block_size)
