"""append_packed on Pallas-Triton: a program owns a head of a row, and writes what changes alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.decode_attention.tiles import cache_operands, read, whole_words, word_columns
from pallas_kernels.packed import Packed, fit, scaled
from pallas_kernels.triton_call import triton_call
from pallas_kernels.triton_scales import layer_index

_HIGHEST = float(np.finfo(np.float32).max)


def append_packed(k, v, keys, recent, values, slot, *, layer=None, interpret=False):
    """See `pallas_kernels.append_packed`. `interpret` runs the kernel's jnp on any device."""
    heads = k.shape[0] * k.shape[1]
    held = [recent.reshape(-1, heads, *recent.shape[-2:]), *cache_operands(keys, values, heads)]
    new = [x.reshape(heads, -1) for x in (k, v)]
    found = triton_call(
        functools.partial(_kernel, bits=keys.bits),
        grid=heads,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in held],
        interpret=interpret,
        name="append_packed_triton",
        aliases={4 + i: i for i in range(len(held))},
    )(layer_index(layer), jnp.asarray(slot, jnp.int32).reshape(1), *new, *held)
    old = [recent, *jax.tree.leaves(keys), *jax.tree.leaves(values)]
    recent, *arrays = (_like(x, was) for x, was in zip(found, old))
    return Packed(*arrays[:3], keys.bits), recent, Packed(*arrays[3:], values.bits)


def _like(x: jax.Array, was: jax.Array) -> jax.Array:
    if was.dtype == jnp.uint8:
        x = jax.lax.bitcast_convert_type(x, jnp.uint8)
    return x.reshape(was.shape)


def unsupported(k, v, keys, recent, values, slot, *, layer=None) -> str | None:
    """Why these arguments cannot run, or None."""
    size = recent.shape[-2]
    if size & (size - 1):
        return f"{size} keys are a group; the kernel takes powers of two"
    return whole_words(values)


def _kernel(layer_ref, slot_ref, k_ref, v_ref, recent_ref, *refs, bits):
    layer, head, slot = layer_ref[0], pl.program_id(0), slot_ref[0]
    recent_out, *refs = refs[6:]
    exists = slot < refs[3].shape[2]  # behind the last slot there is other memory
    _encode_group(k_ref, recent_ref, recent_out, refs[:3], layer, head, slot, bits, exists)
    _encode_value(v_ref, refs[3:], layer, head, slot, bits, exists)


def _encode_group(k_ref, recent_ref, recent_out, refs, layer, head, slot, bits, exists):
    codes_ref, *scale_refs = refs
    size, offset = recent_ref.shape[2], slot % recent_ref.shape[2]
    word = jnp.arange(pl.next_power_of_2(codes_ref.shape[3]), dtype=jnp.int32)
    inside, codes = word < codes_ref.shape[3], []
    index = jax.lax.broadcasted_iota(jnp.int32, (size, len(word)), 0)
    for column in word_columns(word, 16 // bits):
        new = read(k_ref.at[head, column], inside).astype(recent_out.dtype)
        earlier = read(
            recent_ref.at[layer, head, index, column[None]], inside[None] & (index < offset)
        )
        # What is not written yet gets the last key, which widens no channel's range.
        keys = jnp.where(index < offset, earlier, new.astype(jnp.float32)[None])
        scales = fit(jnp.min(keys, axis=0), jnp.max(keys, axis=0), bits)
        codes.append(scaled(keys, *(x[None] for x in scales), bits))
        plt.store(recent_out.at[layer, head, offset, column], new, mask=inside & exists)
        for ref, x in zip(scale_refs, scales):
            plt.store(ref.at[layer, head, slot // size, column], x, mask=inside & exists)
    place = codes_ref.at[layer, head, slot - offset + index, word[None]]
    plt.store(place, _join(codes), mask=jnp.broadcast_to(inside & exists, index.shape))


def _encode_value(v_ref, refs, layer, head, slot, bits, exists):
    codes_ref, *scale_refs = refs
    blocks, size = codes_ref.shape[3:]
    tile = pl.next_power_of_2(blocks), pl.next_power_of_2(size)
    block, word = (jax.lax.broadcasted_iota(jnp.int32, tile, axis) for axis in (0, 1))
    inside = (block < blocks) & (word < size)
    columns = word_columns(block * size + word, 16 // bits)
    values = [read(v_ref.at[head, x], inside) for x in columns]
    lowest = functools.reduce(jnp.minimum, [jnp.where(inside, x, _HIGHEST) for x in values])
    highest = functools.reduce(jnp.maximum, [jnp.where(inside, x, -_HIGHEST) for x in values])
    scales = fit(jnp.min(lowest, axis=1), jnp.max(highest, axis=1), bits)
    codes = [scaled(x, *(scale[:, None] for scale in scales), bits) for x in values]
    plt.store(codes_ref.at[layer, head, slot, block, word], _join(codes), mask=inside & exists)
    first = jnp.arange(tile[0], dtype=jnp.int32)
    for ref, x in zip(scale_refs, scales):
        plt.store(ref.at[layer, head, slot, first], x, mask=(first < blocks) & exists)


def _join(codes) -> jax.Array:
    """Return the words of codes that are to be rounded, the first of a byte in its high nibble."""
    places = (0, 8) if len(codes) == 2 else (4, 0, 12, 8)
    whole = [jnp.floor(x + 0.5).astype(jnp.int32) << place for x, place in zip(codes, places)]
    return functools.reduce(jnp.bitwise_or, whole).astype(jnp.uint16)
