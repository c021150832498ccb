"""decode_attention: one query a row attends to a cache of keys and values."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.packed import Packed


def decode_attention(
    q: jax.Array,
    k: jax.Array | Packed,
    v: jax.Array | Packed,
    mask: jax.Array,
    length,
    *,
    scale: float | None = None,
    layer: jax.Array | int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Return softmax(scale * q k) v over the slots that `mask` shows, the softmax in float32.

    Args:
        q: [B, heads, head_dim].
        k, v: [B, kv_heads, slots, head_dim]; with `layer`, [L, B, kv_heads, slots, head_dim].
            Each has `heads / kv_heads` queries. Or `Packed`: codes of keys are
            [B, kv_heads, groups, tokens of a group, head_dim], with a step for each channel of a
            group, and those of values [B, kv_heads, slots, blocks, channels of a block], with a
            step for each block.
        mask: bool [B, slots]; a row needs a True.
        length: int32 scalar; slots from here on are masked, and a kernel does not read them.
        scale: None is 1 / sqrt(head_dim).
        layer: int scalar, the layer of a stack to read, without a copy of it.
        implementation: None for the fastest that can run; "xla" or "triton".

    Returns:
        [B, heads, head_dim] in q's dtype. A kernel rounds the softmax to the type in which it
        multiplies: that of q and k, or float16 for codes where q is not float32.

    Raises:
        ValueError: shapes that do not fit, or an unknown implementation.
        NotImplementedError: the named implementation cannot run here.

    Example:
        >>> k = v = jnp.ones((1, 2, 8, 16))
        >>> decode_attention(jnp.ones((1, 4, 16)), k, v, jnp.ones((1, 8), bool), 8).shape
        (1, 4, 16)
    """
    (_check_packed if isinstance(k, Packed) else _check)(q, k, v, mask, layer)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return dispatch.run(
        "decode_attention", implementation, q, k, v, mask, length, scale=scale, layer=layer
    )


def _check(q, k, v, mask, layer) -> None:
    if q.ndim != 3:
        raise ValueError(f"q has shape {q.shape}, must be [B, heads, head_dim]")
    if k.ndim != (4 if layer is None else 5) or k.shape != v.shape:
        raise ValueError(
            f"k has shape {k.shape} and v {v.shape}, both must be "
            f"{'[B, ' if layer is None else '[L, B, '}kv_heads, slots, head_dim]"
        )
    batch, kv_heads, slots, head_dim = k.shape[-4:]
    if (q.shape[0], q.shape[2]) != (batch, head_dim) or q.shape[1] % kv_heads:
        raise ValueError(
            f"q has shape {q.shape}, must be [{batch}, a multiple of {kv_heads}, {head_dim}]"
        )
    if mask.shape != (batch, slots):
        raise ValueError(f"mask has shape {mask.shape}, must be {(batch, slots)}")


def _check_packed(q, k, v, mask, layer) -> None:
    if not isinstance(v, Packed) or k.bits != v.bits:
        raise ValueError(f"k is in {k.bits} bits, v must be too")
    lead = "[B, " if layer is None else "[L, B, "
    for name, held, last in (("k", k, "groups, tokens"), ("v", v, "slots, blocks")):
        if held.codes.ndim != (5 if layer is None else 6):
            raise ValueError(
                f"{name}.codes has shape {held.codes.shape}, must be {lead}kv_heads, {last}, bytes]"
            )
    width = 8 // k.bits
    *lead, groups, size, head_dim = k.codes.shape
    slots, blocks, channels = v.codes.shape[-3:]
    like = [*lead, slots, head_dim * width]
    if v.codes.shape[:-3] != tuple(lead) or blocks * channels != head_dim or groups * size < slots:
        raise ValueError(
            f"k.codes has shape {k.codes.shape} and v.codes {v.codes.shape}, of other numbers"
        )
    whole = jax.ShapeDtypeStruct(tuple(like), k.step.dtype)
    _check(q, whole, whole, mask, layer)
