"""append_packed against numpy: XLA's, and the Triton kernel's jnp and lowering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import append_packed
from pallas_kernels.append_packed import triton
from pallas_kernels.packed import Packed
from pallas_kernels.packing import unpack
from tests.pallas_kernels.problems import lower
from tests.pallas_kernels.test_packed_attention import problem

# batch, heads, slots, head_dim, slot: the first and the last of a group, and between.
SHAPES = [(2, 3, 200, 16, 64), (1, 2, 100, 128, 99), (1, 2, 130, 96, 63), (1, 1, 70, 80, 0)]


def arrays(shape, bits, layers, dtype=jnp.float32):
    """k, v, and the cache of packed keys, recent keys and packed values."""
    batch, heads, slots, head_dim, slot = shape
    rng = np.random.default_rng(1)
    sizes = batch, heads, heads, slots, head_dim
    (_, keys, values, _), _ = problem(*sizes, length=slot + 1, bits=bits, layers=layers)
    stack = () if layers is None else (layers,)
    recent = rng.standard_normal((*stack, batch, heads, 64, head_dim)) + 9
    k, v = (rng.standard_normal((batch, heads, head_dim)) for _ in range(2))
    recent[..., slot % 64 :, :] = np.nan  # not read
    k, v, recent = (jnp.asarray(x, dtype) for x in (k, v, recent))
    return k, v, keys, recent, values


def half_a_step(x, axis, bits):
    """Half a step, and what float16 (11 bits) moves the ends of the range by."""
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    return (high - low) / (2 * (2**bits - 1)) + (np.abs(low) + high - low) * 2.0**-10 + 1e-6


def check(found, k, v, keys, recent, values, slot, layer):
    """The group of the slot and its value are within half a step, and all else is as it was."""
    bits, at, offset = keys.bits, (() if layer is None else (layer,)), slot % 64
    group = np.asarray(recent, np.float64)[at][:, :, :offset]
    group = np.concatenate([group, np.asarray(k, np.float64)[:, :, None]], axis=2)
    new_keys, new_recent, new_values = found
    decoded = np.asarray(new_keys.decode(), np.float64)[at][:, :, slot // 64, : offset + 1]
    assert (np.abs(decoded - group) <= half_a_step(group, 2, bits)).all()
    np.testing.assert_array_equal(np.asarray(new_recent, np.float32)[at][:, :, offset], k)
    decoded = np.asarray(new_values.decode(), np.float64)[at][:, :, slot]
    value = np.asarray(v, np.float64).reshape(decoded.shape)
    assert (np.abs(decoded - value) <= half_a_step(value, -1, bits)).all()
    changed = {id(new_keys): slot // 64, id(new_recent): offset, id(new_values): slot}
    for new, old in ((new_keys, keys), (new_recent, recent), (new_values, values)):
        for mine, was in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
            mine, was = (np.array(x, np.float32) for x in (mine, was))  # NaN is equal to NaN there
            place = (*at, slice(None), slice(None), changed[id(new)])
            mine[place] = was[place]
            np.testing.assert_array_equal(mine, was)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_token_joins_the_cache(shape, bits):
    layers, layer = (None, None) if shape[0] == 2 else (2, 1)
    dtype = jnp.float32 if layers is None else jnp.bfloat16
    held = arrays(shape, bits, layers, dtype)
    xla = append_packed(*held, shape[-1], layer=layer, implementation="xla")
    kernel = triton.append_packed(*held, shape[-1], layer=layer, interpret=True)
    for found in (xla, kernel):
        check(found, *held, shape[-1], layer)


def test_a_token_behind_the_last_slot_is_written_nowhere():
    """There is other memory."""
    _, _, slots, *_ = SHAPES[0]
    held = arrays(SHAPES[0], 8, None)
    found = triton.append_packed(*held, slots, interpret=True)
    for mine, was in zip(jax.tree.leaves(found), jax.tree.leaves((held[2], *held[3:]))):
        np.testing.assert_array_equal(mine, was)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_kernel_lowers_for_cuda(shape, bits):
    held = arrays(shape, bits, 2, jnp.bfloat16)
    args = *held, jnp.int32(shape[-1]), jnp.int32(1)
    text = lower(lambda *a: triton.append_packed(*a[:-1], layer=a[-1]), *args)
    assert "append_packed_triton" in text


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"v": (1, 2, 8)},
            r"k has shape \(1, 2, 16\) and v \(1, 2, 8\), both must be \(1, 2, 16\)",
        ),
        (
            {"recent": (3, 1, 2, 64, 16)},
            r"recent has shape \(3, 1, 2, 64, 16\), must be \[B, kv_he",
        ),
        ({"codes": (1, 2, 3, 32, 16)}, r"keys.codes has shape .* must be \(1, 2, 3, 64, 16\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    shapes = {"k": (1, 2, 16), "v": (1, 2, 16), "codes": (1, 2, 3, 64, 16)}
    shapes |= {"recent": (1, 2, 64, 16)} | change
    k, v, codes, recent = (jnp.ones(shape) for shape in shapes.values())
    (_, keys, values, _), _ = problem(1, 2, 2, 192, 16, length=70, bits=8)
    keys = type(keys)(codes, keys.step, keys.low, 8)
    with pytest.raises(ValueError, match=message):
        append_packed(k, v, keys, recent, values, 70)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("shape", [*SHAPES, (8, 32, 2304, 128, 2100)], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_token_joins_the_cache_on_a_gpu(shape, bits):
    held = arrays(shape, bits, 2, jnp.bfloat16)
    call = jax.jit(
        lambda *a: append_packed(*a[:-1], layer=a[-1], implementation="triton"),
        donate_argnums=(2, 3, 4),
    )
    found = call(*held[:2], *jax.tree.map(jnp.copy, held[2:]), jnp.int32(shape[-1]), jnp.int32(1))
    check(found, *held, shape[-1], 1)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_of_a_prompt_fit_the_step_as_stored_on_a_gpu(bits):
    x = np.random.default_rng(2).standard_normal((4, 64, 128)).astype(np.float32)
    found = jax.jit(lambda x: Packed.encode(x, -2, bits))(x)
    codes = np.asarray(found.codes if bits == 8 else unpack(found.codes))
    step, low = (np.asarray(a, np.float64) for a in (found.step, found.low))
    want = np.clip(np.rint((x - low) / step), 0, 2**bits - 1)
    # Ties, as XLA's division on a GPU may be two units in the last place off. Of codes by steps
    # that are not rounded 2.5 % differ in 8 bits, 0.14 % in 4.
    assert np.mean(codes != want) <= 1e-3
