"""The parts of the attention's heads that several programs computed, added up by one kernel.

A program adds up a query head; with an adapter, further ones a row's product with A, whose parts
are products of the heads' parts.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.triton_call import triton_call


def combine(sums, tops, totals, low, factor, dtype, *, batch, splits, interpret):
    """Return [B, heads, head_dim] and factor * x A, [B, R] (None without `low`), in a dtype.

    Args:
        sums: float32 [B * kv_heads * splits, group, head_dim], each the sum of a part's values
            weighted by exp(logit - top).
        tops, totals: float32 [B * kv_heads * splits, group]: top, and the sum of the weights.
        low: `sums` times A, float32 [B * kv_heads * splits, group, R], or None.
    """
    _, group, head_dim = sums.shape
    heads = len(sums) // splits * group // batch
    inputs, programs = [sums, tops, totals], batch * heads
    out_shape = [jax.ShapeDtypeStruct((batch, heads, head_dim), dtype)]
    if low is not None:
        inputs.append(low)
        programs += batch
        out_shape.append(jax.ShapeDtypeStruct((batch, low.shape[-1]), dtype))
    found = triton_call(
        functools.partial(_kernel, splits=splits, factor=factor),
        grid=programs,
        out_shape=out_shape,
        interpret=interpret,
        name="combine_attention_triton",
    )(*inputs)
    return found[0], found[1] if low is not None else None


def _kernel(sums_ref, tops_ref, totals_ref, *refs, splits, factor):
    low_ref, out_ref, hidden_ref = refs if len(refs) == 3 else (None, *refs, None)
    batch, heads, head_dim = out_ref.shape
    group = sums_ref.shape[1]

    def add(ref, head, column, inside):
        """The sum of a head's parts, each by its weight; `head` may be an array."""
        part, query = head // group * splits, head % group

        def load(ref, *place):
            return plt.load(ref.at[place], mask=inside, other=0.0)

        # All loads before the first use.
        tops = [load(tops_ref, part + i, query) for i in range(splits)]
        totals = [load(totals_ref, part + i, query) for i in range(splits)]
        values = [load(ref, part + i, query, column) for i in range(splits)]
        top = functools.reduce(jnp.maximum, tops)
        weights = [jnp.exp(x - top) for x in tops]
        total = sum(x * w for x, w in zip(totals, weights))
        # A row that sees no slot gives zeros.
        return sum(x * w for x, w in zip(values, weights)) / jnp.maximum(total, 1e-30)

    program = pl.program_id(0)

    @pl.when(program < batch * heads)
    def _():
        lane = jax.lax.broadcasted_iota(jnp.int32, (pl.next_power_of_2(head_dim),), 0)
        head, inside = jnp.full_like(lane, program), lane < head_dim
        place = out_ref.at[program // heads, program % heads, lane]
        plt.store(place, add(sums_ref, head, lane, inside).astype(out_ref.dtype), mask=inside)

    if low_ref is None or hidden_ref is None:
        return
    ranks = low_ref.shape[2]
    tile = pl.next_power_of_2(heads), pl.next_power_of_2(ranks)

    @pl.when(program >= batch * heads)
    def _():
        row, rank = program - batch * heads, jnp.arange(tile[1], dtype=jnp.int32)
        head, column = (jax.lax.broadcasted_iota(jnp.int32, tile, axis) for axis in (0, 1))
        inside = (head < heads) & (column < ranks)
        parts = add(low_ref, row * heads + head, column, inside)
        hidden = factor * jnp.sum(parts, axis=0)
        plt.store(hidden_ref.at[row, rank], hidden.astype(hidden_ref.dtype), mask=rank < ranks)
