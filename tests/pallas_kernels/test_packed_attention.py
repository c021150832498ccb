"""decode_attention over keys and values in 8 and 4 bits, against float64 of what the codes say."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention
from pallas_kernels.decode_attention import triton
from pallas_kernels.packed import Packed
from tests.pallas_kernels.problems import lower
from tests.pallas_kernels.test_decode_attention import expected

GROUP = 64


def packed(rng, codes_shape, step_shape, bits):
    """Random codes and scales, and what they are in float64."""
    codes = rng.integers(0, 2**bits, codes_shape, np.uint8)
    # Ranges of size 1 to 4, and offsets as keys have them.
    step = (rng.uniform(1, 4, step_shape) / 2**bits).astype(np.float16)
    low = rng.uniform(-4, 2, step_shape).astype(np.float16)
    worth = codes * step.astype(np.float64) + low.astype(np.float64)
    # Element 2i of a row is the high nibble of byte i.
    held = codes if bits == 8 else codes[..., 0::2] * 16 + codes[..., 1::2]
    return Packed(*map(jnp.asarray, (held, step, low)), bits), worth


def problem(batch, heads, kv_heads, slots, head_dim, *, length, bits, layers=None):
    """q, packed k and v, a mask with holes; and k and v in float64."""
    rng = np.random.default_rng(0)
    lead = (*(() if layers is None else (layers,)), batch, kv_heads)
    groups, block = -(-slots // GROUP), math.gcd(head_dim, 64) if head_dim % 32 == 0 else head_dim
    k, keys = packed(rng, (*lead, groups, GROUP, head_dim), (*lead, groups, 1, head_dim), bits)
    blocks = head_dim // block
    v, values = packed(rng, (*lead, slots, blocks, block), (*lead, slots, blocks, 1), bits)
    q = jnp.asarray(rng.standard_normal((batch, heads, head_dim)), jnp.float32)
    mask = rng.random((batch, slots)) < 0.7
    mask[:, length - 1], mask[:, length:] = True, False
    keys = keys.reshape(*lead, -1, head_dim)[..., :slots, :]
    return (q, k, v, jnp.asarray(mask)), (keys, values.reshape(*lead, slots, head_dim))


# Sums of a hundred products of size 1 to 10, in float32 in another order than code times step plus
# offset would be: some roundings of 6e-8 times 16 in a logit, and again in the mean of values to 6.
ROUNDINGS = 2e-5

# batch, heads, kv_heads, slots, head_dim, length: of one group and of several, in one part and
# more; values of one block, of two, of three and of four; up to 8 queries a key.
SHAPES = [
    (2, 4, 2, 24, 16, 17),
    (1, 2, 2, 200, 128, 130),
    (3, 8, 1, 320, 64, 300),
    (1, 4, 1, 130, 96, 65),
    (70, 4, 4, 160, 8, 65),
    (1, 2, 2, 100, 256, 100),
    (1, 3, 1, 70, 80, 70),
]


CASES = [
    pytest.param(shape, bits, marks=[] if (i + bits // 4) % 2 else pytest.mark.slow)
    for i, shape in enumerate(SHAPES)
    for bits in (8, 4)
]


@pytest.mark.parametrize("shape, bits", CASES, ids=str)
def test_attention_agrees_with_float64(shape, bits):
    *sizes, length = shape
    layers = 3 if length % 2 else None
    (q, k, v, mask), exact = problem(*sizes, length=length, bits=bits, layers=layers)
    layer = None if layers is None else 2
    if layers is not None:
        exact = [x[2] for x in exact]
    how = {"scale": 0.2, "layer": layer}
    xla = decode_attention(q, k, v, mask, length, **how, implementation="xla")
    kernel = triton.decode_attention(q, k, v, mask, length, **how, interpret=True)
    for y in (xla, kernel):
        np.testing.assert_allclose(y, expected(q, *exact, mask, 0.2), atol=ROUNDINGS)


@pytest.mark.parametrize("bits", [8, 4])
def test_products_of_float16_agree_with_float64(bits):
    (q, k, v, mask), exact = problem(2, 8, 2, 130, 64, length=100, bits=bits)
    q = q.astype(jnp.bfloat16)
    y = triton.decode_attention(q, k, v, mask, 100, scale=0.2, interpret=True)
    # Keys and values to 6, and weights, are rounded to 2^-12 of them each; the result to 2^-9.
    want = expected(q, *exact, mask, 0.2)
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=2**-9, atol=6 * 2**-9)


@pytest.mark.parametrize("bits", [8, 4])
def test_slots_after_the_length_are_not_read(bits):
    (q, k, v, mask), exact = problem(1, 2, 2, 256, 64, length=70, bits=bits)
    # Of the group that the length is in, a step belongs to keys before it too.
    k = Packed(k.codes, *(x.at[:, :, 2:].set(jnp.nan) for x in (k.step, k.low)), bits)
    v = Packed(v.codes, *(x.at[:, :, 70:].set(jnp.nan) for x in (v.step, v.low)), bits)
    y = triton.decode_attention(q, k, v, mask, 70, scale=0.25, interpret=True)
    np.testing.assert_allclose(y, expected(q, *exact, mask, 0.25), atol=ROUNDINGS)


def test_a_part_without_a_slot_that_is_seen_adds_nothing():
    (q, k, v, _), exact = problem(1, 2, 2, 256, 64, length=256, bits=8)
    mask = jnp.arange(256)[None] >= 250  # padding on the left
    y = triton.decode_attention(q, k, v, mask, 256, scale=0.25, interpret=True)
    np.testing.assert_allclose(y, expected(q, *exact, mask, 0.25), atol=ROUNDINGS)


@pytest.mark.parametrize("shape", SHAPES[1::2], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_kernel_lowers_for_cuda(shape, bits):
    *sizes, length = shape
    (q, k, v, mask), _ = problem(*sizes, length=length, bits=bits, layers=2)
    args = q.astype(jnp.bfloat16), k, v, mask, jnp.int32(length), jnp.int32(1)
    text = lower(lambda *a: decode_attention(*a[:-1], layer=a[-1]), *args)
    assert "decode_attention_triton" in text


def test_what_is_left_to_xla():
    shape = jax.ShapeDtypeStruct
    (q, k, v, mask), _ = problem(1, 17, 1, 70, 16, length=9, bits=8)
    why = functools.partial(triton.unsupported, mask=mask, length=9, scale=1.0)
    assert why(q, k, v) == "17 queries share a key; the kernel takes 16"
    few = Packed(shape((1, 1, 3, 32, 16), jnp.uint8), k.step, k.low, 8)
    assert why(q[:, :1], few, v) == "32 keys are a group; the kernel takes multiples of 64"
    odd = Packed(shape((1, 1, 70, 1, 5), jnp.uint8), v.step, v.low, 8)
    assert why(q[:, :1], k, odd) == "blocks are 5 bytes; the kernel reads two at a time"


def test_a_cache_of_more_bytes_than_32_bits_count_elements():
    shape, lead = jax.ShapeDtypeStruct, (32, 8, 32)
    scales = [shape((*lead, 64, 1, 128), jnp.float16)] * 2
    k = Packed(shape((*lead, 64, 64, 128), jnp.uint8), *scales, 8)
    scales = [shape((*lead, 4096, 2, 1), jnp.float16)] * 2
    v = Packed(shape((*lead, 4096, 2, 64), jnp.uint8), *scales, 8)
    assert k.codes.size == 2**32
    q, mask = shape((8, 32, 128), jnp.bfloat16), shape((8, 4096), bool)
    attend = functools.partial(triton.decode_attention, scale=0.1)
    args = q, k, v, mask, shape((), jnp.int32), shape((), jnp.int32)
    text = lower(lambda *a: attend(*a[:-1], layer=a[-1]), *args)
    # Offsets of 32 bits reach 2**31 elements: uint16 has no more here.
    assert "decode_attention_triton" in text and "x64x64x64xui16>" in text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 4}, "k is in 8 bits, v must be too"),
        ({"v": (1, 2, 70, 16)}, r"v.codes has shape .* must be \[B, kv_heads, slots, blocks, by"),
        ({"v": (1, 2, 70, 2, 16)}, r"v.codes \(1, 2, 70, 2, 16\), of other numbers"),
        ({"q": (1, 3, 16)}, r"q has shape \(1, 3, 16\), must be \[1, a multiple of 2, 16\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    (q, k, v, mask), _ = problem(1, 2, 2, 70, 16, length=9, bits=8)
    codes = jnp.ones(change.get("v", v.codes.shape), jnp.uint8)
    v = Packed(codes, v.step, v.low, change.get("bits", 8))
    with pytest.raises(ValueError, match=message):
        decode_attention(jnp.ones(change.get("q", q.shape)), k, v, mask, 9)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize(
    "shape", [*SHAPES, (1, 32, 32, 4096, 128, 3000), (2, 64, 8, 512, 128, 300)], ids=str
)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_kernel_agrees_with_float64_on_a_gpu(shape, bits):
    *sizes, length = shape
    (q, k, v, mask), (keys, values) = problem(*sizes, length=length, bits=bits, layers=2)
    attend = jax.jit(functools.partial(decode_attention, scale=0.2, implementation="triton"))
    y = attend(q, k, v, mask, jnp.int32(length), layer=jnp.int32(1))
    want = expected(q, keys[1], values[1], mask, 0.2)
    np.testing.assert_allclose(y, want, atol=ROUNDINGS)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("shape", [(1, 64, 8, 512, 128, 300), (8, 32, 8, 512, 128, 300)], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_products_of_float16_agree_with_float64_on_a_gpu(shape, bits):
    *sizes, length = shape
    (q, k, v, mask), exact = problem(*sizes, length=length, bits=bits)
    q = q.astype(jnp.bfloat16)
    attend = jax.jit(functools.partial(decode_attention, scale=0.2, implementation="triton"))
    want = expected(q, *exact, mask, 0.2)
    y = attend(q, k, v, mask, jnp.int32(length)).astype(jnp.float32)
    np.testing.assert_allclose(y, want, rtol=2**-9, atol=6 * 2**-9)  # as on a CPU, above
