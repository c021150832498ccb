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
from pallas_kernels.decode_attention.tiles import (
    FloatTiles,
    PackedTiles,
    Tiling,
    cache_operands,
    read,
    whole_words,
)
from pallas_kernels.packed import Packed, count_heads
from pallas_kernels.triton_call import triton_call
from pallas_kernels.triton_scales import layer_index

GROUP = 64  # of packed keys: a power of two, and no tile is in two
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
    batch, slots = mask.shape
    kv_heads, head_dim = count_heads(k), q.shape[-1]
    group = q.shape[1] // kv_heads - (0 if new is None else 2)
    tiling = choose_tiling(batch * kv_heads, group, head_dim, packed=isinstance(k, Packed))
    splits = choose_splits(batch * kv_heads, slots, tiling)
    parts = batch * kv_heads * splits
    shapes = [(parts, group, head_dim), (parts, group), (parts, group)]
    out_shape = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    caches = cache_operands(k, v, batch * kv_heads)
    operands = [layer_index(layer), jnp.asarray(length, jnp.int32).reshape(1), q, mask, *caches]
    aliases, a = {}, None if new is None else new.a
    if new is not None:
        operands += [new.cos, new.sin]
        out_shape += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in caches]
        aliases = {4: 3, 5: 4}
    if a is not None:
        operands.append(a.reshape(-1, *a.shape[-2:]))
        out_shape.append(jax.ShapeDtypeStruct((parts, group, a.shape[-2]), jnp.float32))
    static = {"group": group, "kv_heads": kv_heads, "splits": splits, "scale": scale}
    static |= {"tiling": tiling, "caches": len(caches), "interpret": interpret}
    static |= {"appends": new is not None, "adapts": a is not None}
    sums, tops, totals, *more = triton_call(
        functools.partial(_kernel, **static),
        grid=parts,
        out_shape=out_shape,
        interpret=interpret,
        name="decode_attention_triton" if new is None else "append_attention_triton",
        warps=tiling.warps,
        aliases=aliases,
    )(*operands)
    low = more.pop() if a is not None else None
    factor = 1.0 if new is None else new.factor
    many = {"batch": batch, "splits": splits}
    out, hidden = combine(sums, tops, totals, low, factor, q.dtype, **many, interpret=interpret)
    return out, hidden, *(x.reshape(k.shape) for x in more)


def unsupported(q, k, v, mask, length, *, scale, layer=None) -> str | None:
    """Why these arguments cannot run, or None."""
    if (queries := q.shape[1] // count_heads(k)) > MAX_QUERIES:
        return f"{queries} queries share a key; the kernel takes {MAX_QUERIES}"
    packed = isinstance(k, Packed)
    if packed and k.codes.shape[-2] % GROUP:
        return f"{k.codes.shape[-2]} keys are a group; the kernel takes multiples of {GROUP}"
    if packed and (why := whole_words(v)):
        return why
    for name, x in [("q", q)] if packed else [("q", q), ("k", k), ("v", v)]:
        if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            return f"{name} is {x.dtype}; the kernel reads bfloat16, float16 and float32"
    return None


def choose_tiling(heads: int, group: int, head_dim: int, *, packed: bool) -> Tiling:
    """Return how programs walk, for so many heads of all rows and queries a head."""
    if not packed:
        # On an H100, 32 heads of 160 slots: 2.6 us, where 64 rows take 3.5 and 16 take 3.1; heads
        # of 8 queries: 6.9, where 64 take 15.5; 3000 slots: 26, where 64 take 24.
        return Tiling(warps=4, rows=32, passes=1, programs=264)
    # 256 heads of 2176 slots in 8 bits take 67 us; by 2 and 4 warps 70 and 71, with 16 passes 73.
    # Few heads are split no further: 32 of 8000 slots take 39 us, by one warp 45.
    programs = 1056
    warps = 1 if heads * MAX_SPLITS >= programs else 4
    channels = 16 if group <= 4 else 8  # of a thread, which holds their sums for each query
    rows = max(1, min(32 * warps * channels // pl.next_power_of_2(head_dim), GROUP // 2))
    passes = min(GROUP // rows, max(4, 8 // pl.next_power_of_2(group)))
    return Tiling(warps, rows, passes, programs)


def choose_splits(heads: int, slots: int, tiling: Tiling) -> int:
    """Return how many programs share a head: powers of two, while there is work for them."""
    splits = 1
    while (
        splits < MAX_SPLITS
        and heads * splits * 2 <= tiling.programs
        and splits * tiling.slots < slots
    ):
        splits *= 2
    return splits


def _kernel(
    layer_ref,
    length_ref,
    q_ref,
    mask_ref,
    *refs,
    group,
    kv_heads,
    splits,
    scale,
    tiling,
    caches,
    interpret,
    appends,
    adapts,
):
    held_refs, refs = refs[:caches], refs[caches:]
    turn_refs, refs = refs[: 2 * appends], refs[2 * appends :]
    a_refs, refs = refs[:adapts], refs[adapts:]
    sums_ref, tops_ref, totals_ref, *cache_refs = refs
    low_refs = [cache_refs.pop()] if adapts else []
    slots, head_dim = mask_ref.shape[1], q_ref.shape[2]
    part, layer, length = pl.program_id(0), layer_ref[0], length_ref[0]
    head, split = part // splits, part % splits
    row, kv_head = head // kv_heads, head % kv_heads

    def read_head(index, column, turned=appends):
        inside = column < head_dim
        x = read(q_ref.at[row, index, column], inside)
        if not turned:
            return x
        half = head_dim // 2
        other = read(q_ref.at[row, index, (column + half) % head_dim], inside)
        cos, sin = (read(ref.at[row, column % half], inside) for ref in turn_refs)
        return x * cos + jnp.where(column < half, -other, other) * sin

    new, lane = (), jnp.arange(pl.next_power_of_2(head_dim), dtype=jnp.int32)
    if appends:
        heads = group * kv_heads
        new = read_head(heads + kv_head, lane), read_head(heads + kv_heads + kv_head, lane, False)
        new = [x.astype(held_refs[0].dtype) for x in new]
        tiles = FloatTiles(held_refs, layer, head, new, length - 1)
    elif caches == 2:
        tiles = FloatTiles(held_refs, layer, head)
    else:
        tiles = PackedTiles(held_refs, layer, head, interpret)
    queries = [
        [
            scale * jnp.where(tiles.inside, read_head(kv_head * group + g, column), 0.0)
            for column in tiles.columns
        ]
        for g in range(group)
    ]

    def load_a(g):
        """The part of A that meets a head."""
        if not adapts or g == group:
            return None
        ranks, tile = low_refs[0].shape[2], (pl.next_power_of_2(low_refs[0].shape[2]), len(lane))
        rank, column = (jax.lax.broadcasted_iota(jnp.int32, tile, axis) for axis in (0, 1))
        place = (kv_head * group + g) * head_dim + column
        return read(a_refs[0].at[layer, rank, place], (rank < ranks) & (column < head_dim))

    a = load_a(0)  # early, for its latency

    def add_tile(i, carry):
        first = (split + i * splits) * tiling.slots
        rows = jnp.arange(tiling.rows, dtype=jnp.int32)
        each = [first + p * tiling.rows + rows for p in range(tiling.passes)]
        seen = [plt.load(mask_ref.at[row, x], mask=x < slots, other=False) for x in each]
        tile = tiles.load(first, each, [x < jnp.minimum(slots, length) for x in each])
        out = []
        for query, (sums, top, total) in zip(queries, carry):
            logits = [jnp.where(s, x, _LOWEST) for s, x in zip(seen, tile.dot(query))]
            new_top = functools.reduce(jnp.maximum, [tile.fold(jnp.max, x) for x in logits], top)
            factor = jnp.exp(top - new_top)
            # There may be no slot that is seen: its exponentials are not 1 but nothing.
            weights = [jnp.where(s, jnp.exp(x - new_top), 0.0) for s, x in zip(seen, logits)]
            sums = tile.add(sums, factor, weights)
            total = sum((tile.fold(jnp.sum, w) for w in weights), total * factor)
            out.append((sums, new_top, total))
        return out

    count = pl.cdiv(length, tiling.slots)
    mine = pl.cdiv(jnp.maximum(count - split, 0), splits)
    sums, nothing = tiles.start(tiling.rows)
    start = [(sums, nothing + _LOWEST, nothing)] * group
    for g, found in enumerate(jax.lax.fori_loop(0, mine, add_tile, start)):
        sums, top, total = tiles.finish(*found)
        for x, column in zip(sums, tiles.columns):
            plt.store(sums_ref.at[part, g, column], x, mask=tiles.inside)
        tops_ref[part, g] = top
        totals_ref[part, g] = total
        if adapts:
            following, low = load_a(g + 1), jnp.sum(a * sums[0][None, :], axis=1)
            rank = jnp.arange(len(low), dtype=jnp.int32)
            plt.store(low_refs[0].at[part, g, rank], low, mask=rank < low_refs[0].shape[2])
            a = following
    # The only program that has read this slot, and put the new token in its place, writes it.
    # Behind the last slot there is other memory.
    writes = (lane < head_dim) & ((count - 1) % splits == split) & (length <= slots)
    for ref, x in zip(cache_refs, new):
        plt.store(ref.at[layer, head, length - 1, lane], x, mask=writes)
