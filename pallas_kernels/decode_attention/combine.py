"""The parts of the attention's heads that several programs computed, added up by one kernel.

A program adds up a query head; with an adapter, further ones some columns of a row's product with
A, whose parts are products of the heads' parts.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.triton_call import triton_call

TILE = 8192  # numbers of a program: 64 a thread


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
    inputs, programs, ranks = [sums, tops, totals], batch * heads, 0
    out_shape = [jax.ShapeDtypeStruct((batch, heads, head_dim), dtype)]
    if low is not None:
        inputs.append(low)
        ranks = pl.next_power_of_2(low.shape[-1])
        ranks = max(1, min(ranks, TILE // (splits * pl.next_power_of_2(heads))))
        programs += batch * pl.cdiv(low.shape[-1], ranks)
        out_shape.append(jax.ShapeDtypeStruct((batch, low.shape[-1]), dtype))
    found = triton_call(
        functools.partial(_kernel, splits=splits, ranks=ranks, factor=factor),
        grid=programs,
        out_shape=out_shape,
        interpret=interpret,
        name="combine_attention_triton",
        # One warp has nothing to exchange; more splits by it would be too many registers.
        warps=1 if splits <= 4 and low is None else 4,
    )(*inputs)
    return found[0], found[1] if low is not None else None


def _kernel(sums_ref, tops_ref, totals_ref, *refs, splits, ranks, factor):
    low_ref, out_ref, hidden_ref = refs if len(refs) == 3 else (None, *refs, None)
    batch, heads, head_dim = out_ref.shape
    group = sums_ref.shape[1]

    def add(ref, head, column, inside):
        """The sums of heads [n] at columns [m], each part by its weight: [n, m]."""
        part = jax.lax.broadcasted_iota(jnp.int32, (splits, len(head)), 0)
        place = (head // group * splits)[None] + part, (head % group)[None]
        # All loads before the first use.
        within = jnp.broadcast_to((head < batch * heads)[None], part.shape)
        tops, totals = (
            plt.load(x.at[place], mask=within, other=0.0) for x in (tops_ref, totals_ref)
        )
        place = *(x[:, :, None] for x in place), column[None, None]
        mask = jnp.broadcast_to(inside[None], (splits, *inside.shape))
        values = plt.load(ref.at[place], mask=mask, other=0.0)
        top = jnp.max(tops, axis=0)
        weights = jnp.exp(tops - top[None])
        total = jnp.sum(totals * weights, axis=0)
        # A row that sees no slot gives zeros.
        return jnp.sum(values * weights[:, :, None], axis=0) / jnp.maximum(total, 1e-30)[:, None]

    program = pl.program_id(0)

    @pl.when(program < batch * heads)
    def _():
        lane = jnp.arange(pl.next_power_of_2(head_dim), dtype=jnp.int32)
        head, inside = program + jnp.arange(1, dtype=jnp.int32), (lane < head_dim)[None]
        place = out_ref.at[program // heads, program % heads, lane[None]]
        plt.store(place, add(sums_ref, head, lane, inside).astype(out_ref.dtype), mask=inside)

    if low_ref is None or hidden_ref is None:
        return

    @pl.when(program >= batch * heads)
    def _():
        parts = pl.cdiv(low_ref.shape[2], ranks)
        row, part = (program - batch * heads) // parts, (program - batch * heads) % parts
        head = jnp.arange(pl.next_power_of_2(heads), dtype=jnp.int32)
        rank = part * ranks + jnp.arange(ranks, dtype=jnp.int32)
        inside = (head < heads)[:, None] & (rank < low_ref.shape[2])[None]
        found = jnp.where(inside, add(low_ref, row * heads + head, rank, inside), 0.0)
        hidden = (factor * jnp.sum(found, axis=0)).astype(hidden_ref.dtype)
        plt.store(hidden_ref.at[row, rank], hidden, mask=rank < low_ref.shape[2])
