"""append_packed: a key and a value a head join a cache that holds them in 8 or 4 bits."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.packed import Packed


def append_packed(
    k: jax.Array,
    v: jax.Array,
    keys: Packed,
    recent: jax.Array,
    values: Packed,
    slot,
    *,
    layer: jax.Array | int | None = None,
    implementation: str | None = None,
) -> tuple[Packed, jax.Array, Packed]:
    """Write the value, and encode the group of keys that the new one is in.

    Args:
        k, v: [B, kv_heads, head_dim], of one token a row.
        keys, values: as `decode_attention` takes them; a kernel writes them in place where they
            are donated.
        recent: [B, kv_heads, tokens of a group, head_dim], with `layer` [L, B, ...]: the last keys
            as they are, the first of a group first; those from the slot on are not read.
        slot: int32 scalar, where the token belongs.
        layer: int scalar, the layer of a stack to write.
        implementation: None for the fastest that can run; "xla" or "triton".

    Returns:
        keys, recent and values with the token.

    Raises:
        ValueError: shapes that do not fit, or an unknown implementation.
        NotImplementedError: the named implementation cannot run here.

    Example:
        >>> x = jnp.ones((1, 2, 16))
        >>> keys = Packed.zeros((1, 2, 3, 64, 16), -2, bits=8)
        >>> values = Packed.zeros((1, 2, 192, 1, 16), -1, bits=8)
        >>> recent = jnp.zeros((1, 2, 64, 16))
        >>> keys, recent, values = append_packed(x, x, keys, recent, values, 70)
        >>> values.decode()[0, 0, 70, 0, 0]
        Array(1., dtype=float32)
    """
    lead = recent.shape[:-2]
    group, head_dim = recent.shape[-2:]
    if k.shape != v.shape or k.shape != (*lead[-2:], head_dim):
        raise ValueError(
            f"k has shape {k.shape} and v {v.shape}, both must be {(*lead[-2:], head_dim)}"
        )
    if recent.ndim != (4 if layer is None else 5):
        raise ValueError(
            f"recent has shape {recent.shape}, must be {'[B, ' if layer is None else '[L, B, '}"
            "kv_heads, tokens of a group, head_dim]"
        )
    want = (*lead, keys.codes.shape[-3], group, head_dim * keys.bits // 8)
    if keys.codes.shape != want:
        raise ValueError(f"keys.codes has shape {keys.codes.shape}, must be {want}")
    return dispatch.run(
        "append_packed", implementation, k, v, keys, recent, values, slot, layer=layer
    )
