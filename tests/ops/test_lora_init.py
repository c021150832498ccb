"""LoftQ and PiSSA against exact singular value decompositions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.blockwise import quantize
from qjax.core.config import QuantConfig
from qjax.ops.lora import lora_weight
from qjax.ops.lora_init import loftq, low_rank, pissa

CFG = QuantConfig(block_size=32, double_quant=False)
KEY = jax.random.key(0)


def best_error(w: np.ndarray, rank: int) -> float:
    """What any matrix of this rank leaves at least of w, by Frobenius norm (Eckart and Young)."""
    return np.linalg.norm(np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)[rank:])


@pytest.mark.parametrize("decay", [0.0, 0.5], ids=["flat", "decaying"])
def test_low_rank_is_nearly_the_best(decay, rng):
    u, _ = np.linalg.qr(rng.normal(size=(96, 64)))
    v, _ = np.linalg.qr(rng.normal(size=(64, 64)))
    values = (1 + np.arange(64)) ** -decay * (1 + 0.2 * rng.random(64))
    w = (u * values) @ v
    left, right = low_rank(jnp.asarray(w, jnp.float32), 8, KEY)
    assert left.shape == (96, 8) and right.shape == (8, 64)
    error = np.linalg.norm(w - np.asarray(left, np.float64) @ np.asarray(right, np.float64))
    # 1 % is what the module promises; less than the best there is not, but for float32.
    assert best_error(w, 8) <= error * (1 + 1e-6) and error < 1.01 * best_error(w, 8)
    # Both halves carry the same share of each direction.
    np.testing.assert_allclose(
        np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1), rtol=1e-4
    )


SHAPES = {  # shape, contract axes, batch axes
    "dense": ((64, 48), (0,), 0),
    "heads": ((64, 4, 12), (0,), 0),
    "out": ((2, 32, 48), (0, 1), 0),
    "experts": ((2, 64, 48), (0,), 1),
}


def parts(w, new, a, b, contract, batch_ndim):
    update = np.asarray(lora_weight(a, b, contract, batch_ndim), np.float64)
    decoded = new.dequantize(jnp.float32) if hasattr(new, "dequantize") else new
    return np.asarray(w, np.float64), np.asarray(decoded, np.float64), update


@pytest.mark.parametrize("name", SHAPES)
def test_both_are_nearer_to_the_weight_than_quantization(name, rng):
    shape, contract, batch_ndim = SHAPES[name]
    w = jnp.asarray(rng.normal(size=shape), jnp.float32)
    q = quantize(w, CFG, contract, batch_ndim=batch_ndim)
    plain = np.linalg.norm(np.asarray(q.dequantize() - w))
    args = (w, q, 8, 2.0, contract, batch_ndim, KEY)
    for new, a, b in (pissa(*args), loftq(*args, 1), loftq(*args, 5)):
        assert (new.format, new.block_size, new.shape) == (q.format, q.block_size, q.shape)
        exact, decoded, update = parts(w, new, a, b, contract, batch_ndim)
        assert np.linalg.norm(decoded + 2.0 * update - exact) < plain


def test_one_iteration_of_loftq_keeps_the_base_and_fits_what_it_lost(rng):
    w = jnp.asarray(rng.normal(size=(96, 64)), jnp.float32)
    q = quantize(w, CFG)
    new, a, b = loftq(w, q, 8, 0.5, (0,), 0, KEY, 1)
    np.testing.assert_array_equal(new.packed, q.packed)
    exact, decoded, update = parts(w, new, a, b, (0,), 0)
    error = np.linalg.norm(decoded + 0.5 * update - exact)
    # As near to the best as the subspace iteration comes on noise, whose spectrum is flat.
    assert error < 1.01 * best_error(exact - decoded, 8)


def test_pissa_has_the_largest_directions_and_leaves_the_rest(rng):
    w = jnp.asarray(rng.normal(size=(64, 48)), jnp.float32)
    left, a, b = pissa(w, w, 8, 2.0, (0,), 0, KEY)  # of a float weight nothing is lost
    exact, rest, update = parts(w, left, a, b, (0,), 0)
    np.testing.assert_allclose(rest + 2.0 * update, exact, atol=1e-5)  # float32 sums of 8 terms
    u, s, vt = np.linalg.svd(exact)
    assert np.linalg.norm(rest) < 1.01 * np.linalg.norm(s[8:])


def test_a_rank_above_the_weights_is_named():
    with pytest.raises(ValueError, match=r"rank=9 is more than a weight of \[32, 8\] has"):
        pissa(jnp.ones((32, 8)), jnp.ones((32, 8)), 9, 1.0, (0,), 0, KEY)
