"""decode_attention against float64 numpy: XLA's, and the Triton kernel's jnp and lowering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention
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
    # Weighted means of values of size 1: a few float32 roundings in the logits and the sums.
    for y in (xla, kernel):
        np.testing.assert_allclose(y, expected(q, *own, mask, 0.3), atol=5e-6)


def test_slots_after_the_length_are_not_read():
    q, k, v, mask = problem(1, 2, 2, 256, 16, length=70)
    poisoned = [x.at[:, :, 70:].set(jnp.nan) for x in (k, v)]
    y = triton.decode_attention(q, *poisoned, mask, 70, scale=0.25, interpret=True)
    np.testing.assert_allclose(y, expected(q, k, v, mask, 0.25), atol=5e-6)


def test_a_part_without_a_slot_that_is_seen_adds_nothing():
    q, k, v, _ = problem(1, 2, 2, 256, 16, length=256)
    mask = jnp.arange(256)[None] >= 250  # padding on the left
    y = triton.decode_attention(q, k, v, mask, 256, scale=0.25, interpret=True)
    np.testing.assert_allclose(y, expected(q, k, v, mask, 0.25), atol=5e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_lowers_for_cuda(shape, dtype):
    *sizes, length = shape
    q, k, v, mask = problem(*sizes, length=length, layers=2, dtype=dtype)
    attend = functools.partial(triton.decode_attention, scale=0.25)
    args = q, k, v, mask, jnp.int32(length), jnp.int32(1)
    assert "decode_attention_triton" in lower(lambda *a: attend(*a[:-1], layer=a[-1]), *args)


def test_programs_share_a_head_where_heads_are_few():
    assert triton.choose_splits(heads=32, slots=256) == 8
    assert triton.choose_splits(heads=64, slots=8192) == 4
    assert triton.choose_splits(heads=8, slots=8192) == 16
    assert triton.choose_splits(heads=1024, slots=8192) == 1


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


def test_many_queries_of_a_head_are_left_to_xla():
    q, k = jax.ShapeDtypeStruct((1, 71, 64), jnp.float32), jnp.ones((1, 1, 8, 64))
    why = triton.unsupported(q, k, k, None, 8, scale=1.0)
    assert why == "71 queries share a key; the kernel takes 8"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize(
    "shape", [*SHAPES, (1, 32, 32, 4096, 128, 3000), (2, 64, 8, 512, 128, 300)]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_agrees_with_float64_on_a_gpu(shape, dtype):
    *sizes, length = shape
    q, k, v, mask = problem(*sizes, length=length, layers=2, dtype=dtype)
    attend = jax.jit(functools.partial(decode_attention, scale=0.2, implementation="triton"))
    y = attend(q, k, v, mask, jnp.int32(length), layer=jnp.int32(1))
    # As above; bfloat16 rounds the result to 2^-9.
    atol = 5e-6 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(y.astype(jnp.float32), expected(q, k[1], v[1], mask, 0.2), atol=atol)
