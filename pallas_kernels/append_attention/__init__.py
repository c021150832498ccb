"""append_attention: a new token joins a cache of keys and values, and its query attends to it."""

import jax

from pallas_kernels import dispatch


def append_attention(
    qkv: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    length,
    cos: jax.Array,
    sin: jax.Array,
    a: jax.Array | None = None,
    *,
    factor: float = 1.0,
    scale: float | None = None,
    layer: jax.Array | int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
    """Rotate the query and the key, write key and value at the last slot, and attend.

    Args:
        qkv: [B, heads + 2 kv_heads, head_dim]: queries, keys and values of one token a row.
        k, v: as `decode_attention` takes them; a kernel writes them in place where they are
            donated.
        mask: bool [B, slots], True at the new slot.
        length: int32 scalar, the slots in use with the new one, which is the last of them.
        cos, sin: float32 [B, head_dim / 2], of the rotation of element i of a head together with
            element i + head_dim / 2 (RoPE, arXiv:2104.09864).
        a: A of the next layer's adapter, transposed, in qkv's dtype: [R, heads * head_dim], with
            `layer` [L, R, heads * head_dim]; None for none.
        factor: of the result's product with A.
        scale, layer: as `decode_attention` takes them.
        implementation: None for the fastest that can run; "xla" or "triton".

    Returns:
        [B, heads, head_dim] and factor * that A^T, [B, R] (None without `a`), in qkv's dtype and
        computed in float32; k and v with the new token.

    Raises:
        ValueError: shapes that do not fit, or an unknown implementation.
        NotImplementedError: the named implementation cannot run here.

    Example:
        >>> k = v = jnp.ones((1, 2, 8, 16))
        >>> mask, turn = jnp.ones((1, 8), bool), jnp.ones((1, 8))
        >>> out, *_ = append_attention(jnp.ones((1, 8, 16)), k, v, mask, 8, turn, turn)
        >>> out.shape
        (1, 4, 16)
    """
    _check(qkv, k, v, mask, cos, sin, a, layer)
    if scale is None:
        scale = qkv.shape[-1] ** -0.5
    arrays = qkv, k, v, mask, length, cos, sin, a
    how = {"factor": factor, "scale": scale, "layer": layer}
    return dispatch.run("append_attention", implementation, *arrays, **how)


def _check(qkv, k, v, mask, cos, sin, a, layer) -> None:
    if k.ndim != (4 if layer is None else 5) or (k.shape, k.dtype) != (v.shape, v.dtype):
        raise ValueError(
            f"k is {jax.typeof(k)} and v {jax.typeof(v)}, both must be "
            f"{'[B, ' if layer is None else '[L, B, '}kv_heads, slots, head_dim]"
        )
    batch, kv_heads, slots, head_dim = k.shape[-4:]
    fits = qkv.ndim == 3 and (qkv.shape[0], qkv.shape[2]) == (batch, head_dim)
    if not fits or qkv.shape[1] <= 2 * kv_heads or qkv.shape[1] % kv_heads:
        raise ValueError(
            f"qkv has shape {qkv.shape}, must be [{batch}, a multiple of {kv_heads} above "
            f"{2 * kv_heads}, {head_dim}]"
        )
    if mask.shape != (batch, slots):
        raise ValueError(f"mask has shape {mask.shape}, must be {(batch, slots)}")
    if not cos.shape == sin.shape == (batch, head_dim // 2):
        raise ValueError(
            f"cos has shape {cos.shape} and sin {sin.shape}, both must be {(batch, head_dim // 2)}"
        )
    width, lead = (qkv.shape[1] - 2 * kv_heads) * head_dim, "" if layer is None else "L, "
    if a is not None and (a.ndim != 2 + (layer is not None) or a.shape[-1] != width):
        raise ValueError(f"a has shape {a.shape}, must be [{lead}R, {width}]")
    if a is not None and a.dtype != qkv.dtype:
        raise ValueError(f"a is {a.dtype}, must be qkv's {qkv.dtype}")
