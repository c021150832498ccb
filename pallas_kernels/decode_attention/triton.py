"""decode_attention on Pallas-Triton: k and v are read once, up to the last slot in use.

A program owns a key-value head of a row with all its queries, and walks along the slots in tiles
with a running maximum and sum (arXiv:2112.05682). Where rows and heads are too few to fill the GPU,
several programs share the tiles of one head, and `combine` adds their parts (arXiv:2311.01282).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.decode_attention.combine import combine
from pallas_kernels.triton_call import triton_call
from pallas_kernels.triton_scales import layer_index

# Slots a step. On an H100, 32 heads of 160 slots: 2.6 us, where 64 take 3.5 and 16 take 3.1; heads
# of 8 queries: 6.9, where 64 take 15.5; 3000 slots: 26, where 64 take 24.
TILE = 32
PROGRAMS = 264  # enough to fill the 132 multiprocessors of an H100 twice
MAX_SPLITS = 16
MAX_QUERIES = 8  # of a head: each has its sums in registers
_LOWEST = float(np.finfo(np.float32).min)


class NewToken(NamedTuple):
    """What `append_attention` is given besides."""

    cos: jax.Array
    sin: jax.Array
    a: jax.Array | None
    factor: float


def decode_attention(q, k, v, mask, length, *, scale, layer=None, interpret=False):
    """See `pallas_kernels.decode_attention`. `interpret` runs the kernel's jnp on any device."""
    return attend(q, k, v, mask, length, None, scale=scale, layer=layer, interpret=interpret)[0]


def attend(q, k, v, mask, length, new: NewToken | None, *, scale, layer, interpret):
    """Return what `append_attention` says; without a new token, None in place of x A."""
    batch, kv_heads, slots, head_dim = k.shape[-4:]
    group = q.shape[1] // kv_heads - (0 if new is None else 2)
    splits = choose_splits(batch * kv_heads, slots)
    parts = batch * kv_heads * splits
    shapes = [(parts, group, head_dim), (parts, group), (parts, group)]
    out_shape = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    caches = [x.reshape(-1, batch * kv_heads, slots, head_dim) for x in (k, v)]
    operands = [layer_index(layer), jnp.asarray(length, jnp.int32).reshape(1), q, *caches, mask]
    aliases, a = {}, None if new is None else new.a
    if new is not None:
        operands += [new.cos, new.sin]
        out_shape += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in caches]
        aliases = {3: 3, 4: 4}
    if a is not None:
        operands.append(a.reshape(-1, *a.shape[-2:]))
        out_shape.append(jax.ShapeDtypeStruct((parts, group, a.shape[-2]), jnp.float32))
    static = {"group": group, "kv_heads": kv_heads, "splits": splits, "scale": scale}
    static |= {"appends": new is not None, "adapts": a is not None}
    sums, tops, totals, *more = triton_call(
        functools.partial(_kernel, **static),
        grid=parts,
        out_shape=out_shape,
        interpret=interpret,
        name="decode_attention_triton" if new is None else "append_attention_triton",
        aliases=aliases,
    )(*operands)
    low = more.pop() if a is not None else None
    factor = 1.0 if new is None else new.factor
    many = {"batch": batch, "splits": splits}
    out, hidden = combine(sums, tops, totals, low, factor, q.dtype, **many, interpret=interpret)
    return out, hidden, *(x.reshape(k.shape) for x in more)


def unsupported(q, k, v, mask, length, *, scale, layer=None) -> str | None:
    """Why these arguments cannot run, or None."""
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


def _kernel(
    layer_ref,
    length_ref,
    q_ref,
    k_ref,
    v_ref,
    mask_ref,
    *refs,
    group,
    kv_heads,
    splits,
    scale,
    appends,
    adapts,
):
    turn_refs, refs = refs[: 2 * appends], refs[2 * appends :]
    a_refs, refs = refs[:adapts], refs[adapts:]
    sums_ref, tops_ref, totals_ref, *cache_refs = refs
    low_refs = [cache_refs.pop()] if adapts else []
    slots, head_dim = k_ref.shape[2:]
    lanes = pl.next_power_of_2(head_dim)
    part, layer, length = pl.program_id(0), layer_ref[0], length_ref[0]
    head, split = part // splits, part % splits
    row, kv_head = head // kv_heads, head % kv_heads
    lane = jax.lax.broadcasted_iota(jnp.int32, (lanes,), 0)
    inside = lane < head_dim

    def read_head(index, turned=appends):
        x = _read(q_ref.at[row, index, lane], inside)
        if not turned:
            return x
        half = head_dim // 2
        other = _read(q_ref.at[row, index, (lane + half) % head_dim], inside)
        cos, sin = (_read(ref.at[row, lane % half], inside) for ref in turn_refs)
        return x * cos + jnp.where(lane < half, -other, other) * sin

    queries = [scale * read_head(kv_head * group + g) for g in range(group)]
    new = ()
    if appends:
        heads = group * kv_heads
        new = read_head(heads + kv_head), read_head(heads + kv_heads + kv_head, turned=False)
        new = [x.astype(k_ref.dtype) for x in new]

    def load_a(g):
        """The part of A that meets a head."""
        if not adapts or g == group:
            return None
        ranks, tile = low_refs[0].shape[2], (pl.next_power_of_2(low_refs[0].shape[2]), lanes)
        rank, column = (jax.lax.broadcasted_iota(jnp.int32, tile, axis) for axis in (0, 1))
        place = (kv_head * group + g) * head_dim + column
        return _read(a_refs[0].at[layer, rank, place], (rank < ranks) & (column < head_dim))

    a = load_a(0)  # early, for its latency

    def add_tile(i, carry):
        first = (split + i * splits) * TILE
        slot = first + jax.lax.broadcasted_iota(jnp.int32, (TILE,), 0)
        seen = plt.load(mask_ref.at[row, slot], mask=slot < slots, other=False)
        place = first + jax.lax.broadcasted_iota(jnp.int32, (TILE, lanes), 0)
        column = jax.lax.broadcasted_iota(jnp.int32, (TILE, lanes), 1)
        used = (place < jnp.minimum(slots, length)) & (column < head_dim)
        keys = _read(k_ref.at[layer, head, place, column], used)
        values = _read(v_ref.at[layer, head, place, column], used)
        if appends:
            keys, values = (
                jnp.where(place == length - 1, x.astype(jnp.float32)[None, :], held)
                for x, held in zip(new, (keys, values))
            )
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

    tiles = pl.cdiv(length, TILE)
    mine = pl.cdiv(jnp.maximum(tiles - split, 0), splits)
    start = (jnp.zeros((lanes,), jnp.float32), jnp.float32(_LOWEST), jnp.float32(0))
    for g, (sums, top, total) in enumerate(jax.lax.fori_loop(0, mine, add_tile, (start,) * group)):
        plt.store(sums_ref.at[part, g, lane], sums, mask=inside)
        tops_ref[part, g] = top
        totals_ref[part, g] = total
        if adapts:
            following, low = load_a(g + 1), jnp.sum(a * sums[None, :], axis=1)
            rank = jax.lax.broadcasted_iota(jnp.int32, low.shape, 0)
            plt.store(low_refs[0].at[part, g, rank], low, mask=rank < low_refs[0].shape[2])
            a = following
    # The only program that has read this slot, and put the new token in its place, writes it.
    writes = inside & ((tiles - 1) % splits == split)
    for ref, x in zip(cache_refs, new):
        plt.store(ref.at[layer, head, length - 1, lane], x, mask=writes)


def _read(ref, mask) -> jax.Array:
    return plt.load(ref, mask=mask, other=0.0).astype(jnp.float32)
