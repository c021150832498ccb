"""prepare_input: what a layer multiplies by its weight, and by A of its adapter, for few rows."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch

KINDS = ("plain", "rms_norm", "silu_gate")


def prepare_input(
    x: jax.Array,
    a: jax.Array | None = None,
    scale: jax.Array | None = None,
    *,
    kind: str = "plain",
    epsilon: float = 0.0,
    offset: float = 0.0,
    factor: float = 1.0,
    layer: jax.Array | int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Return the input y of a linear layer, made from x as `kind` says, and factor * y A^T.

    Args:
        x: float [M, K]; of "silu_gate", [M, 2 K].
        a: A of adapters, transposed, in x's dtype: [R, K]; None for none.
        scale: of "rms_norm", float [K].
        kind: "plain", y is x; "rms_norm", x / sqrt(mean(x**2) + epsilon) * (offset + scale)
            (arXiv:1910.07467); "silu_gate", silu(x[:, :K]) * x[:, K:] (arXiv:2002.05202).
        factor: of the second result.
        layer: int scalar, the layer of stacks [L, R, K] of `a` and [L, K] of `scale` that is read,
            without a copy.
        implementation: None for the fastest that can run; "xla" or "triton".

    Returns:
        y [M, K] and [M, R] (None without `a`) in x's dtype, both computed in float32.

    Raises:
        ValueError: shapes that do not fit, a `scale` for another kind, or an unknown kind or
            implementation.
        NotImplementedError: the named implementation cannot run here.

    Example:
        >>> y, hidden = prepare_input(jnp.full((1, 4), 2.0), jnp.ones((3, 4)))
        >>> hidden
        Array([[8., 8., 8.]], dtype=float32)
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, must be one of {KINDS}")
    _check(x, a, scale, kind, layer)
    if kind == "plain" and a is None:
        return x, None
    options = {"kind": kind, "epsilon": epsilon, "offset": offset, "factor": factor}
    return dispatch.run("prepare_input", implementation, x, a, scale, **options, layer=layer)


def _check(x, a, scale, kind: str, layer) -> None:
    if x.ndim != 2 or (kind == "silu_gate" and x.shape[1] % 2):
        raise ValueError(f"x has shape {x.shape}, must be [M, {'2 ' * (kind == 'silu_gate')}K]")
    k = x.shape[1] // 2 if kind == "silu_gate" else x.shape[1]
    lead = "" if layer is None else "L, "
    stacked = layer is not None
    if a is not None and (a.ndim != 2 + stacked or a.shape[-1] != k or a.dtype != x.dtype):
        raise ValueError(f"a must be {x.dtype}[{lead}R, {k}] and is {jax.typeof(a)}")
    if (scale is not None) != (kind == "rms_norm"):
        raise ValueError(f"scale is of kind 'rms_norm', and of no other; kind is {kind!r}")
    if scale is not None and (scale.ndim != 1 + stacked or scale.shape[-1] != k):
        raise ValueError(f"scale has shape {scale.shape}, must be [{lead}{k}]")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating point and is {x.dtype}")
