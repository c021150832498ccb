"""decode_attention on Pallas-Triton: k and v are read once, up to the last slot in use.

A program owns a key-value head of a row with all its queries, and walks along the slots in tiles
with a running maximum and sum (arXiv:2112.05682): by tensor cores in `products`, or in `rows` where
keys are packed and of few queries. Where rows and heads are too few to fill the GPU, several
programs share the tiles of one head, and `combine` adds their parts (arXiv:2311.01282).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.decode_attention import products, rows
from pallas_kernels.decode_attention.combine import combine
from pallas_kernels.decode_attention.tiles import Tiling, cache_operands, whole_words
from pallas_kernels.packed import Packed, count_heads
from pallas_kernels.triton_call import triton_call
from pallas_kernels.triton_scales import layer_index

GROUP = 64  # of packed keys: a power of two, and no tile is in two
MAX_QUERIES = 16  # of a head: the rows of a product
MAX_ROW_QUERIES = 2  # of a head in `rows`: each has its sums in registers
MAX_BYTES = 2048  # of a key: tiles lie in shared memory
FEW_HEADS = 32  # of all rows: not enough to fill an H100 by programs of one warp


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
    packed = isinstance(k, Packed)
    tiling = choose_tiling(batch * kv_heads, group, head_dim, k.bits if packed else k.dtype)
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
    static |= {"tiling": tiling, "interpret": interpret}
    kernel = rows.kernel
    if not packed or group > MAX_ROW_QUERIES:
        kernel = products.kernel
        static |= {"caches": len(caches), "appends": new is not None, "adapts": a is not None}
    sums, tops, totals, *more = triton_call(
        functools.partial(kernel, **static),
        grid=parts,
        out_shape=out_shape,
        interpret=interpret,
        name="decode_attention_triton" if new is None else "append_attention_triton",
        warps=tiling.warps,
        stages=tiling.stages,
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
    if not packed and (size := k.shape[-1] * k.dtype.itemsize) > MAX_BYTES:
        return f"a key has {size} bytes; the kernel takes {MAX_BYTES}"
    for name, x in [("q", q)] if packed else [("q", q), ("k", k), ("v", v)]:
        if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            return f"{name} is {x.dtype}; the kernel reads bfloat16, float16 and float32"
    return None


def choose_tiling(heads: int, group: int, head_dim: int, held: int | jnp.dtype) -> Tiling:
    """Return how programs walk.

    Args:
        heads: key-value heads of all rows.
        group: queries of a head.
        held: dtype of the cache, or its bits.
    """
    width = pl.next_power_of_2(head_dim)
    if isinstance(held, int) and group <= MAX_ROW_QUERIES:
        return _choose_rows(heads, group, width)
    # On an H100; other tilings in benchmarks/NOTES-end-to-end.md.
    few, wide = heads < FEW_HEADS, max(1, width // 128)  # a warp has sums of 128 channels
    if not isinstance(held, int):
        size = width * held.itemsize
        slots = max(16, 32 * 256 // max(256, size)) if few else 16
        stages = 3 if size <= 512 else 2  # what fits in the shared memory of other GPUs too
        return Tiling(4 if few else wide, slots, 1, stages, *((528, 32) if few else (1056, 16)))
    if not few:
        return Tiling(wide, 128 // held, 1, 3, 1056, 16)
    return Tiling(4, 64, 1, 3, 528, 16) if held == 8 else Tiling(2 * wide, 32, 1, 3, 1056, 16)


def _choose_rows(heads: int, group: int, width: int) -> Tiling:
    """Return how programs of `rows` walk."""
    # 256 heads of 2176 slots in 8 bits take 67 us; by 2 and 4 warps 70 and 71, with 16 passes 73.
    # Few heads are split no further: 32 of 8000 slots take 39 us, by one warp 45.
    programs, splits = 1056, 16
    warps = 1 if heads * splits >= programs else 4
    channels = 16  # of a thread, which holds their sums for each query
    slots = max(1, min(32 * warps * channels // width, GROUP // 2))
    passes = min(GROUP // slots, max(4, 8 // group))
    return Tiling(warps, slots, passes, 1, programs, splits)


def choose_splits(heads: int, slots: int, tiling: Tiling) -> int:
    """Return how many programs share a head: powers of two, while there is work for them."""
    splits = 1
    while (
        splits < tiling.splits
        and heads * splits * 2 <= tiling.programs
        and splits * tiling.slots < slots
    ):
        splits *= 2
    return splits
