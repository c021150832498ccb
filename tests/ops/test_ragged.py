"""Groups of rows times a weight each, against float64 and XLA's own ragged product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.ops.ragged import ragged_dot

E, K, N, SIZES = 3, 64, 40, (4, 0, 5)


@pytest.fixture
def q(rng):
    w = jnp.asarray(rng.normal(size=(E, K, N)).astype(np.float32))
    return qjax.quantize(w, qjax.QuantConfig(block_size=32), batch_ndim=1)


@pytest.mark.parametrize("jitted", [False, True])
def test_matches_float64(q, rng, jitted):
    x = rng.normal(size=(sum(SIZES), K)).astype(np.float32)
    w = np.asarray(q.dequantize(), np.float64)
    expert = np.repeat(np.arange(E), SIZES)
    want = np.einsum("mk,mkn->mn", x, w[expert])
    run = jax.jit(ragged_dot) if jitted else ragged_dot
    got = run(jnp.asarray(x), q, jnp.asarray(SIZES))
    # Sums of 64 float32 products of normal numbers.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_gradient_keeps_the_packed_weight_alone(q, rng):
    x = jnp.asarray(rng.normal(size=(sum(SIZES), K)).astype(np.float32))
    g = jnp.asarray(rng.normal(size=(sum(SIZES), N)).astype(np.float32))
    _, vjp = jax.vjp(lambda x: ragged_dot(x, q, jnp.asarray(SIZES)), x)
    w = np.asarray(q.dequantize(), np.float64)
    want = np.einsum("mn,mkn->mk", g, w[np.repeat(np.arange(E), SIZES)])
    # As above.
    np.testing.assert_allclose(vjp(g)[0], want, rtol=1e-4, atol=1e-4)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "nbytes")]
    assert max(sizes) <= q.packed.nbytes


def test_bfloat16(q, rng):
    x = jnp.asarray(rng.normal(size=(sum(SIZES), K)), jnp.bfloat16)
    got = ragged_dot(x, q, jnp.asarray(SIZES))
    assert got.dtype == jnp.bfloat16
    want = np.einsum(
        "mk,mkn->mn",
        np.asarray(x, np.float64),
        np.asarray(q.dequantize(), np.float64)[np.repeat(np.arange(E), SIZES)],
    )
    # The weight and the result rounded to 8 bits each, of sums of 64 products: 0.004 * 2 * 8 * 3.
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=0.2)


def test_errors(q):
    x, sizes = jnp.ones((2, K)), jnp.array(SIZES)
    with pytest.raises(TypeError, match="q must be a QTensor, got ArrayImpl"):
        ragged_dot(x, q.packed, sizes)
    with pytest.raises(TypeError, match="x must be floating, got int32"):
        ragged_dot(jnp.ones((2, K), jnp.int32), q, sizes)
    with pytest.raises(ValueError, match=r"x must be \[M, 64\], got shape \(2, 63\)"):
        ragged_dot(x[:, 1:], q, sizes)
    with pytest.raises(ValueError, match=r"q must be \[E, K, N\], quantized along K"):
        ragged_dot(x, qjax.quantize(jnp.ones((K, N))), sizes)
