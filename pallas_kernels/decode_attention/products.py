"""The kernel of queries that meet their keys and values in products by tensor cores.

The queries of a key are the rows of a product, padded to 16. Tiles come to shared memory while
earlier ones are multiplied, which is the compiler's work: its pipeline has `Tiling.stages`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.decode_attention.tiles import LOWEST, FloatTiles, PackedTiles, lanes, read


def product_dtype(q, held):
    """Return what queries and a cache of these are multiplied in; words are those of codes."""
    if held != jnp.uint16:
        return jnp.promote_types(q, held)
    return jnp.dtype(jnp.float32 if q == jnp.float32 else jnp.float16)


def kernel(
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
    """See `triton.attend`: a program adds up its part of a head's slots."""
    held_refs, refs = refs[:caches], refs[caches:]
    turn_refs, refs = refs[: 2 * appends], refs[2 * appends :]
    a_refs, refs = refs[:adapts], refs[adapts:]
    sums_ref, tops_ref, totals_ref, *cache_refs = refs
    low_refs = [cache_refs.pop()] if adapts else []
    slots, head_dim = mask_ref.shape[1], q_ref.shape[2]
    part, layer, length = pl.program_id(0), layer_ref[0], length_ref[0]
    head, split = part // splits, part % splits
    row, kv_head = head // kv_heads, head % kv_heads
    # Behind the last slot there is other memory.
    writes = (split == splits - 1) & (length <= slots)

    def read_heads(index, column, inside, turned=appends):
        inside = inside[:, None] & (column < head_dim)[None]
        index, column = index[:, None], column[None]
        x = read(q_ref.at[row, index, column], inside)
        if not turned:
            return x
        half = head_dim // 2
        other = read(q_ref.at[row, index, (column + half) % head_dim], inside)
        cos, sin = (read(ref.at[row, column % half], column < head_dim) for ref in turn_refs)
        return x * cos + jnp.where(column < half, -other, other) * sin

    dtype = product_dtype(q_ref.dtype, held_refs[0].dtype)
    if caches == 2:
        tiles = FloatTiles(held_refs, layer, head, dtype)
    else:
        tiles = PackedTiles(held_refs, layer, head, dtype, interpret)
    query = lanes(group)
    index, inside = kv_head * group + query, query < group
    queries = [read_heads(index, column, inside) for column in tiles.key_columns]
    lane = lanes(head_dim)

    def load_a(g):
        """The part of A that meets a head."""
        ranks, tile = low_refs[0].shape[2], (pl.next_power_of_2(low_refs[0].shape[2]), len(lane))
        rank, column = (jax.lax.broadcasted_iota(jnp.int32, tile, axis) for axis in (0, 1))
        place = (kv_head * group + g) * head_dim + column
        return read(a_refs[0].at[layer, rank, place], (rank < ranks) & (column < head_dim))

    a = [load_a(0)] if adapts else []  # early, for its latency
    sums = [jnp.zeros((len(query), len(column)), jnp.float32) for column in tiles.value_columns]
    top, total, new = jnp.full_like(sums[0][:, 0], LOWEST), jnp.zeros_like(sums[0][:, 0]), []
    if appends:
        # The new token begins the sums of one program, which writes it: none reads its slot.
        one = jnp.arange(1, dtype=jnp.int32)
        at = group * kv_heads + kv_head + one
        new = [read_heads(at, lane, one == 0), read_heads(at + kv_heads, lane, one == 0, False)]
        new = [x.astype(held_refs[0].dtype) for x in new]
        key, value = (x.astype(jnp.float32) for x in new)
        top = jnp.where(writes, scale * jnp.sum(queries[0] * key, axis=1), top)
        total = jnp.where(writes, 1.0, total)
        sums = [jnp.where(writes, value, sums[0])]
    end = jnp.minimum(slots, length - int(appends))

    def slots_of(i):
        first = (split + i * splits) * tiling.slots
        slot = first + jnp.arange(tiling.slots, dtype=jnp.int32)
        return first, slot, slot < end

    def look_ahead(i):
        """What is small of a tile is loaded a tile ahead, as the compiler does with the rest."""
        first, slot, used = slots_of(i)
        seen = plt.load(mask_ref.at[row, slot], mask=used, other=False)
        return seen, tiles.load_scales(first, slot, used)

    def add_tile(i, carry):
        sums, top, total, (seen, scales) = carry
        ahead = look_ahead(i + 1)
        _, slot, used = slots_of(i)
        seen, (keys, values) = seen[None], tiles.load(slot, used, scales)
        products = [_product(x, held.T, interpret) for x, held in zip(queries, keys)]
        logits = jnp.where(seen, scale * functools.reduce(jnp.add, products), LOWEST)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        factor = jnp.exp(top - new_top)
        # There may be no slot that is seen: its exponentials are not 1 but nothing.
        weights = jnp.where(seen, jnp.exp(logits - new_top[:, None]), 0.0)
        sums = [
            x * factor[:, None] + _product(weights, held, interpret)
            for x, held in zip(sums, values)
        ]
        return sums, new_top, total * factor + jnp.sum(weights, axis=1), ahead

    count = pl.cdiv(end, tiling.slots)
    turns = pl.cdiv(jnp.maximum(count - split, 0), splits)
    start = sums, top, total, look_ahead(0)
    sums, top, total, _ = jax.lax.fori_loop(0, turns, add_tile, start)
    for x, column in zip(sums, tiles.value_columns):
        mask = inside[:, None] & (column < head_dim)[None]
        plt.store(sums_ref.at[part, query[:, None], column[None]], x, mask=mask)
    plt.store(tops_ref.at[part, query], top, mask=inside)
    plt.store(totals_ref.at[part, query], total, mask=inside)
    for g in range(group * adapts):
        if g + 1 < group:
            a.append(load_a(g + 1))
        mine = jnp.sum(jnp.where((query == g)[:, None], sums[0], 0.0), axis=0)
        low = jnp.sum(a[g] * mine[None], axis=1)
        rank = jnp.arange(len(low), dtype=jnp.int32)
        plt.store(low_refs[0].at[part, g, rank], low, mask=rank < low_refs[0].shape[2])
    for ref, x in zip(cache_refs, new):
        place, within = ref.at[layer, head, length - 1, lane[None]], (lane < head_dim)[None]
        plt.store(place, x, mask=within & writes)


def _product(a, b, interpret: bool) -> jax.Array:
    """Return a b in float32; a is rounded to b's dtype, whose products are exact."""
    precision = None
    if b.dtype == jnp.float32:
        exact = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = jax.lax.Precision.HIGHEST if interpret else exact
    how = {"precision": precision, "preferred_element_type": jnp.float32}
    return jnp.dot(a.astype(b.dtype), b, **how)
