"""decode_attention on Pallas-Triton: k and v are read once, up to the last slot in use.

A program owns a key-value head of a row with all its queries, and walks along the slots in tiles
with a running maximum and sum (arXiv:2112.05682). Where rows and heads are too few to fill the GPU,
several programs share the tiles of one head, and XLA adds their parts (arXiv:2311.01282).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.triton_call import triton_call
from pallas_kernels.triton_scales import layer_index

# Slots a step. On an H100, 32 heads of 160 slots: 2.6 us, where 64 take 3.5 and 16 take 3.1; heads
# of 8 queries: 6.9, where 64 take 15.5; 3000 slots: 26, where 64 take 24.
TILE = 32
PROGRAMS = 264  # enough to fill the 132 multiprocessors of an H100 twice
MAX_SPLITS = 16
MAX_QUERIES = 8  # of a head: each has its sums in registers
MAX_ELEMENTS = 2**31  # Triton offsets are 32 bits
_LOWEST = float(np.finfo(np.float32).min)


def decode_attention(q, k, v, mask, length, *, scale, layer=None, interpret=False):
    """See `pallas_kernels.decode_attention`. `interpret` runs the kernel's jnp on any device."""
    batch, kv_heads, slots, head_dim = k.shape[-4:]
    group = q.shape[1] // kv_heads
    splits = choose_splits(batch * kv_heads, slots)
    parts = batch * kv_heads * splits
    shapes = [(parts, group, head_dim), (parts, group), (parts, group)]
    kernel = functools.partial(
        _kernel, kv_heads=kv_heads, slots=slots, head_dim=head_dim, splits=splits, scale=scale
    )
    sums, tops, totals = triton_call(
        kernel,
        grid=parts,
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        interpret=interpret,
        name="decode_attention_triton",
    )(
        layer_index(layer),
        jnp.asarray(length, jnp.int32).reshape(1),
        q.reshape(batch * kv_heads, group, head_dim),
        k.reshape(-1, batch * kv_heads, slots, head_dim),
        v.reshape(-1, batch * kv_heads, slots, head_dim),
        mask,
    )
    sums, tops, totals = (
        x.reshape(batch * kv_heads, splits, group, -1) for x in (sums, tops, totals)
    )
    return _combine(sums, tops, totals).reshape(q.shape).astype(q.dtype)


def unsupported(q, k, v, mask, length, *, scale, layer=None) -> str | None:
    """Why these arguments cannot run, or None."""
    if k.size >= MAX_ELEMENTS:
        return f"k has {k.size} elements, and Triton's 32-bit offsets stop at {MAX_ELEMENTS}"
    if q.shape[1] // k.shape[-3] > MAX_QUERIES:
        return f"{q.shape[1] // k.shape[-3]} queries share a key; the kernel takes {MAX_QUERIES}"
    for name, dtype in (("q", q.dtype), ("k", k.dtype), ("v", v.dtype)):
        if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            return f"{name} is {dtype}; the kernel reads bfloat16, float16 and float32"
    return None


def choose_splits(heads: int, slots: int) -> int:
    """Return how many programs share a head: powers of two, while there is work for them."""
    splits = 1
    while splits < MAX_SPLITS and heads * splits * 2 <= PROGRAMS and splits * TILE < slots:
        splits *= 2
    return splits


def _combine(sums, tops, totals) -> jax.Array:
    """Add the parts of a head [heads, splits, group, ...]: written out, to be one fused kernel."""
    splits = range(sums.shape[1])
    top = functools.reduce(jnp.maximum, (tops[:, i] for i in splits))
    factors = [jnp.exp(tops[:, i] - top) for i in splits]
    # A row that sees no slot gives zeros.
    total = functools.reduce(jnp.add, (totals[:, i] * factors[i] for i in splits))
    return functools.reduce(jnp.add, (sums[:, i] * factors[i] for i in splits)) / jnp.maximum(
        total, 1e-30
    )


def _kernel(
    layer_ref,
    length_ref,
    q_ref,
    k_ref,
    v_ref,
    mask_ref,
    sums_ref,
    tops_ref,
    totals_ref,
    *,
    kv_heads,
    slots,
    head_dim,
    splits,
    scale,
):
    lanes = pl.next_power_of_2(head_dim)
    group = q_ref.shape[1]
    part, layer = pl.program_id(0), layer_ref[0]
    head, split = part // splits, part % splits
    lane = jax.lax.broadcasted_iota(jnp.int32, (lanes,), 0)
    queries = [scale * _read(q_ref.at[head, g, lane], lane < head_dim) for g in range(group)]

    def add_tile(i, carry):
        first = (split + i * splits) * TILE
        slot = first + jax.lax.broadcasted_iota(jnp.int32, (TILE,), 0)
        seen = plt.load(mask_ref.at[head // kv_heads, slot], mask=slot < slots, other=False)
        row = first + jax.lax.broadcasted_iota(jnp.int32, (TILE, lanes), 0)
        column = jax.lax.broadcasted_iota(jnp.int32, (TILE, lanes), 1)
        inside = (row < jnp.minimum(slots, length_ref[0])) & (column < head_dim)
        keys = _read(k_ref.at[layer, head, row, column], inside)
        values = _read(v_ref.at[layer, head, row, column], inside)
        out = []
        for query, (sums, top, total) in zip(queries, carry):
            logits = jnp.sum(keys * query[None, :], axis=1)
            logits = jnp.where(seen, logits, _LOWEST)
            new_top = jnp.maximum(top, jnp.max(logits))
            factor = jnp.exp(top - new_top)
            # A tile may have no slot that is seen: its exponentials are not 1 but nothing.
            weights = jnp.where(seen, jnp.exp(logits - new_top), 0.0)
            sums = sums * factor + jnp.sum(values * weights[:, None], axis=0)
            out.append((sums, new_top, total * factor + jnp.sum(weights)))
        return tuple(out)

    tiles = pl.cdiv(length_ref[0], TILE)
    mine = pl.cdiv(jnp.maximum(tiles - split, 0), splits)
    start = (jnp.zeros((lanes,), jnp.float32), jnp.float32(_LOWEST), jnp.float32(0))
    for g, (sums, top, total) in enumerate(jax.lax.fori_loop(0, mine, add_tile, (start,) * group)):
        plt.store(sums_ref.at[part, g, lane], sums, mask=lane < head_dim)
        tops_ref[part, g] = top
        totals_ref[part, g] = total


def _read(ref, mask) -> jax.Array:
    return plt.load(ref, mask=mask, other=0.0).astype(jnp.float32)
