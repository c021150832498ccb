"""decode_attention against float64 numpy: XLA's, and the Triton kernel's jnp and lowering."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import append_attention, decode_attention
from pallas_kernels.append_attention import triton as append_triton
from pallas_kernels.decode_attention import triton
from tests.pallas_kernels.problems import lower


def problem(batch, heads, kv_heads, slots, head_dim, *, length, layers=None, dtype=np.float32):
    """q, k, v and a mask with holes, float32 values of size 1."""
    rng = np.random.default_rng(0)
    stack = () if layers is None else (layers,)
    shapes = [(batch, heads, head_dim), *[(*stack, batch, kv_heads, slots, head_dim)] * 2]
    q, k, v = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    mask = rng.random((batch, slots)) < 0.7
    mask[:, length - 1], mask[:, length:] = True, False
    return q, k, v, jnp.asarray(mask)


def expected(q, k, v, mask, scale):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    logits = scale * np.einsum("bhd,bhsd->bhs", q, k)
    logits = np.where(np.asarray(mask)[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhs,bhsd->bhd", weights / weights.sum(-1, keepdims=True), v)


# Weighted means of values of size 1: a few float32 roundings in the logits and the sums.
ROUNDINGS = 5e-6

# batch, heads, kv_heads, slots, head_dim, length: of one tile and of several, in one part and more.
SHAPES = [
    (2, 4, 2, 24, 16, 17),
    (1, 2, 2, 200, 48, 130),
    (3, 6, 1, 320, 32, 300),
    (70, 4, 4, 160, 8, 65),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layers", [None, 3])
def test_attention_agrees_with_float64(shape, layers):
    *sizes, length = shape
    q, k, v, mask = problem(*sizes, length=length, layers=layers)
    layer = None if layers is None else 2
    own = (k, v) if layers is None else (k[2], v[2])
    xla = decode_attention(q, k, v, mask, length, scale=0.3, layer=layer, implementation="xla")
    kernel = triton.decode_attention(q, k, v, mask, length, scale=0.3, layer=layer, interpret=True)
    for y in (xla, kernel):
        np.testing.assert_allclose(y, expected(q, *own, mask, 0.3), atol=ROUNDINGS)


def test_products_of_bfloat16_agree_with_float64():
    q, k, v, mask = problem(3, 6, 1, 320, 32, length=300, dtype=jnp.bfloat16)
    y = triton.decode_attention(q, k, v, mask, 300, scale=0.3, interpret=True)
    # Weights and the result are rounded to 2^-9 each.
    error = np.abs(np.asarray(y, np.float64) - expected(q, k, v, mask, 0.3))
    assert error.max() < 2**-8


def test_slots_after_the_length_are_not_read():
    q, k, v, mask = problem(1, 2, 2, 256, 16, length=70)
    poisoned = [x.at[:, :, 70:].set(jnp.nan) for x in (k, v)]
    y = triton.decode_attention(q, *poisoned, mask, 70, scale=0.25, interpret=True)
    np.testing.assert_allclose(y, expected(q, k, v, mask, 0.25), atol=ROUNDINGS)


def test_a_part_without_a_slot_that_is_seen_adds_nothing():
    q, k, v, _ = problem(1, 2, 2, 256, 16, length=256)
    mask = jnp.arange(256)[None] >= 250  # padding on the left
    y = triton.decode_attention(q, k, v, mask, 256, scale=0.25, interpret=True)
    np.testing.assert_allclose(y, expected(q, k, v, mask, 0.25), atol=ROUNDINGS)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 8, 4, 300, 256, 290)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_lowers_for_cuda(shape, dtype):
    *sizes, length = shape
    q, k, v, mask = problem(*sizes, length=length, layers=2, dtype=dtype)
    attend = functools.partial(triton.decode_attention, scale=0.25)
    args = q, k, v, mask, jnp.int32(length), jnp.int32(1)
    assert "decode_attention_triton" in lower(lambda *a: attend(*a[:-1], layer=a[-1]), *args)
    (qkv, cos, sin), _ = appended(q, k, v, length, 1)
    append = functools.partial(append_triton.append_attention, scale=0.25)
    args = qkv, k, v, mask, jnp.int32(length), cos, sin, adapter(q, 2), jnp.int32(1)
    text = lower(lambda *a: append(*a[:-1], layer=a[-1]), *args)
    assert "append_attention_triton" in text and "combine_attention_triton" in text


def test_programs_share_a_head_where_heads_are_few():
    def splits(heads, slots, held=jnp.dtype(jnp.bfloat16), group=1):
        return triton.choose_splits(heads, slots, triton.choose_tiling(heads, group, 128, held))

    assert splits(heads=32, slots=64) == 4
    assert splits(heads=64, slots=8192) == 16
    assert splits(heads=256, slots=8192) == 4
    assert splits(heads=1024, slots=8192) == 1
    # Programs of four warps: fewer of them.
    assert splits(heads=8, slots=256) == 8
    assert splits(heads=8, slots=8192) == 32
    assert splits(heads=256, slots=8192, held=8) == 4
    assert splits(heads=32, slots=8192, held=8) == 16
    assert splits(heads=8, slots=256, held=8, group=8) == 4
    assert splits(heads=64, slots=8192, held=4, group=4) == 16


def appended(q, k, v, length, layer):
    """(qkv, cos, sin) of a new token, and (q, k, v) of the layer with it, in float64."""
    rng = np.random.default_rng(1)
    batch, kv_heads, _, head_dim = k.shape[-4:]
    key, value = (rng.standard_normal((batch, kv_heads, head_dim), np.float32) for _ in range(2))
    key, value = (np.asarray(x, q.dtype) for x in (key, value))
    angle = rng.uniform(0, 6, (batch, head_dim // 2)).astype(np.float32)
    # A pair of elements is a complex number, which the rotation multiplies.
    factor = np.exp(1j * angle.astype(np.float64))[:, None]

    def turn(x):
        first, second = np.split(np.asarray(x, np.float64), 2, axis=-1)
        turned = (first + 1j * second) * factor
        return np.concatenate([turned.real, turned.imag], axis=-1)

    k, v = (np.array(x if layer is None else x[layer], np.float64) for x in (k, v))
    k[:, :, length - 1], v[:, :, length - 1] = turn(key), value
    qkv = jnp.concatenate([q, key, value], axis=1)
    return (qkv, jnp.cos(angle), jnp.sin(angle)), (turn(q), k, v)


def check_appended(found, k, v, want, mask, length, layer, atol):
    _, new_k, new_v = want
    for mine, held, new in zip(found[1:], (k, v), (new_k, new_v)):
        mine, held = (np.array(x, np.float64) for x in (mine, held))
        here = mine if layer is None else mine[layer]
        np.testing.assert_allclose(here[:, :, length - 1], new[:, :, length - 1], atol=atol)
        here[:, :, length - 1] = (held if layer is None else held[layer])[:, :, length - 1]
        np.testing.assert_array_equal(mine, held)  # nothing else was written
    y = np.asarray(found[0], np.float64)
    np.testing.assert_allclose(y, expected(*want, mask, 0.3), atol=atol)


def adapter(q, layers):
    """A [R, heads * head_dim], or a stack, of a rank that is no power of two."""
    shape = () if layers is None else (layers,)
    a = np.random.default_rng(2).standard_normal((*shape, 6, q.shape[1] * q.shape[2]))
    return jnp.asarray(a, q.dtype)


def check_hidden(hidden, a, layer, out, atol):
    if a is None:
        assert hidden is None
        return
    a = np.asarray(a if layer is None else a[layer], np.float64)
    want = 0.5 * out.reshape(len(out), -1) @ a.T
    # An error of atol in each of K elements, of either sign, times numbers of size 1.
    rounding = 2**-8 if hidden.dtype == jnp.bfloat16 else 0.0  # of the result
    found = np.asarray(hidden, np.float64)
    np.testing.assert_allclose(found, want, atol=atol * a.shape[1] ** 0.5, rtol=rounding)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layers", [None, 3])
def test_a_new_token_joins_the_cache(shape, layers):
    *sizes, length = shape
    q, k, v, mask = problem(*sizes, length=length, layers=layers)
    layer = None if layers is None else 2
    (qkv, cos, sin), want = appended(q, k, v, length, layer)
    k, v = (x.at[..., length - 1, :].set(jnp.nan) for x in (k, v))  # what was there is not read
    arrays = qkv, k, v, mask, length, cos, sin
    a = None if layers is None else adapter(q, layers)
    how: dict[str, Any] = {"factor": 0.5, "scale": 0.3, "layer": layer}
    xla = append_attention(*arrays, a, **how, implementation="xla")
    kernel = append_triton.append_attention(*arrays, a, **how, interpret=True)
    for out, hidden, *held in (xla, kernel):
        check_appended((out, *held), k, v, want, mask, length, layer, ROUNDINGS)
        check_hidden(hidden, a, layer, expected(*want, mask, 0.3), ROUNDINGS)


@pytest.mark.gpu
def test_a_new_token_behind_the_last_slot_is_written_nowhere_on_a_gpu():
    """There is the next head; the interpreter would write nothing in any case."""
    q, k, v, mask = problem(1, 2, 2, 64, 16, length=64)
    (qkv, cos, sin), _ = appended(q, k, v, 64, None)
    arrays = qkv, k, v, mask, 65, cos, sin
    _, _, *held = append_attention(*arrays, scale=0.3, implementation="triton")
    for mine, was in zip(held, (k, v)):
        np.testing.assert_array_equal(mine, was)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"qkv": (2, 4, 16)},
            r"qkv has shape \(2, 4, 16\), must be \[2, a multiple of 2 above 4, 16",
        ),
        ({"v": (2, 2, 9, 16)}, r"k is float32\[2,2,8,16\] and v float32\[2,2,9,16\], both must be"),
        ({"mask": (1, 8)}, r"mask has shape \(1, 8\), must be \(2, 8\)"),
        ({"cos": (2, 16)}, r"cos has shape \(2, 16\) and sin \(2, 8\), both must be \(2, 8\)"),
        ({"a": (3, 32)}, r"a has shape \(3, 32\), must be \[R, 64\]"),
    ],
)
def test_shapes_of_a_new_token_that_do_not_fit_are_named(change, message):
    shapes = {"qkv": (2, 8, 16), "k": (2, 2, 8, 16), "v": (2, 2, 8, 16), "mask": (2, 8)}
    shapes |= {"length": (), "cos": (2, 8), "sin": (2, 8), "a": (3, 64)} | change
    arrays = [jnp.ones(shape, bool if name == "mask" else float) for name, shape in shapes.items()]
    with pytest.raises(ValueError, match=message):
        append_attention(*arrays)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": (2, 16)}, r"q has shape \(2, 16\), must be \[B, heads, head_dim\]"),
        ({"q": (2, 3, 16)}, r"q has shape \(2, 3, 16\), must be \[2, a multiple of 2, 16\]"),
        ({"k": (2, 2, 16)}, r"k has shape \(2, 2, 16\) and v .* must be \[B, kv_heads, slots"),
        ({"mask": (1, 8)}, r"mask has shape \(1, 8\), must be \(2, 8\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    shapes = {"q": (2, 4, 16), "k": (2, 2, 8, 16), "v": (2, 2, 8, 16), "mask": (2, 8)} | change
    arrays = [jnp.ones(shape, bool if name == "mask" else float) for name, shape in shapes.items()]
    with pytest.raises(ValueError, match=message):
        decode_attention(*arrays, 8)


def test_a_cache_of_more_elements_than_32_bits_count():
    shape = jax.ShapeDtypeStruct
    k = shape((32, 8, 32, 5120, 128), jnp.bfloat16)
    qkv, mask = shape((8, 96, 128), k.dtype), shape((8, 5120), bool)
    turn = shape((8, 64), jnp.float32)
    arrays = qkv, k, k, mask, shape((), jnp.int32), turn, turn, None, shape((), jnp.int32)
    append = functools.partial(append_triton.append_attention, scale=0.1)
    assert append_triton.unsupported(*arrays[:-1], scale=0.1, layer=arrays[-1]) is None
    # Pallas takes 64-bit offsets above 2**32 bytes.
    assert "append_attention_triton" in lower(lambda *a: append(*a[:-1], layer=a[-1]), *arrays)


def test_adapters_that_the_kernel_does_not_take():
    x = jnp.ones
    arrays = x((1, 6, 16)), *[x((1, 1, 8, 16))] * 2, x((1, 8), bool), 8, *[x((1, 8))] * 2
    with pytest.raises(ValueError, match="a is bfloat16, must be qkv's float32"):
        append_attention(*arrays, x((3, 64), jnp.bfloat16))
    why = append_triton.unsupported(*arrays, x((1000, 64)), scale=1.0)
    assert why == "rank 1000 and 4 heads of 16 are too much for the registers"


def test_many_queries_and_long_keys_are_left_to_xla():
    q, k = jax.ShapeDtypeStruct((1, 71, 64), jnp.float32), jnp.ones((1, 1, 8, 64))
    why = triton.unsupported(q, k, k, None, 8, scale=1.0)
    assert why == "71 queries share a key; the kernel takes 16"
    q, k = jax.ShapeDtypeStruct((1, 1, 1024), jnp.float32), jnp.ones((1, 1, 8, 1024))
    why = triton.unsupported(q, k, k, None, 8, scale=1.0)
    assert why == "a key has 4096 bytes; the kernel takes 2048"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize(
    "shape",
    [
        *SHAPES,
        (1, 32, 32, 4096, 128, 3000),
        (2, 64, 8, 512, 128, 300),
        (1, 8, 4, 300, 256, 290),
        (8, 8, 4, 300, 256, 290),
        (1, 16, 1, 700, 128, 650),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_agrees_with_float64_on_a_gpu(shape, dtype):
    *sizes, length = shape
    q, k, v, mask = problem(*sizes, length=length, layers=2, dtype=dtype)
    attend = jax.jit(functools.partial(decode_attention, scale=0.2, implementation="triton"))
    y = attend(q, k, v, mask, jnp.int32(length), layer=jnp.int32(1))
    # As above; bfloat16 rounds the result to 2^-9.
    atol = ROUNDINGS if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(y.astype(jnp.float32), expected(q, k[1], v[1], mask, 0.2), atol=atol)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("shape", [SHAPES[1], (2, 64, 8, 512, 128, 300)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_new_token_joins_the_cache_on_a_gpu(shape, dtype):
    *sizes, length = shape
    q, k, v, mask = problem(*sizes, length=length, layers=2, dtype=dtype)
    (qkv, cos, sin), want = appended(q, k, v, length, 1)
    append = functools.partial(append_attention, factor=0.5, scale=0.3, implementation="triton")
    call = jax.jit(lambda *a: append(*a[:-1], layer=a[-1]), donate_argnums=(1, 2))
    a = adapter(q, 2)
    arrays = mask, jnp.int32(length), cos, sin, a, jnp.int32(1)
    out, hidden, *held = call(qkv, jnp.copy(k), jnp.copy(v), *arrays)
    # bfloat16 rounds keys of size 4 to 2^-7.
    atol = ROUNDINGS if dtype == jnp.float32 else 4e-2
    check_appended((out, *held), k, v, want, mask, length, 1, atol)
    check_hidden(hidden, a, 1, expected(*want, mask, 0.3), atol)
