"""Adapters' products against float64 einsums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.ops.lora import lora_einsum, lora_matmul, lora_take, lora_weight

# Two products accumulated in float32 over at most 24 terms of some 1: 24 * 2 * 2**-24 * 10.
TOLERANCE = dict(rtol=1e-5, atol=3e-5)


def draw(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]


def double(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


@pytest.mark.parametrize("batch", [(), (3,)])
def test_matmul(batch):
    x, a, b = draw((*batch, 2, 5, 24), (*batch, 4, 6, 2), (*batch, 2, 3, 5))
    y = lora_matmul(x, a, b, len(batch))
    x, a, b = double(x, a, b)
    letter = "e" if batch else ""
    w = np.einsum(f"{letter}ijr,{letter}rno->{letter}ijno", a, b).reshape(*batch, 24, 3, 5)
    np.testing.assert_allclose(
        y, np.einsum(f"{letter}btk,{letter}kno->{letter}btno", x, w), **TOLERANCE
    )


# Equation, shapes of x, A and B, "A,B->W", contract axes of a slice, batch axes.
EINSUMS = {
    "heads": ("btd,dnh->btnh", (2, 3, 8), (8, 2), (2, 3, 4), "dr,rnh->dnh", (0,), 0),
    "out": ("btnh,nhd->btd", (2, 3, 3, 4), (3, 4, 2), (2, 8), "nhr,rd->nhd", (0, 1), 0),
    "middle": ("...d,ndh->n...h", (2, 8), (8, 2), (2, 3, 4), "dr,rnh->ndh", (1,), 0),
    "experts": ("ebd,edf->ebf", (3, 2, 8), (3, 8, 2), (3, 2, 4), "edr,erf->edf", (0,), 1),
    "experts_summed": ("ebd,edf->bf", (3, 2, 8), (3, 8, 2), (3, 2, 4), "edr,erf->edf", (0,), 1),
    "one_x_for_experts": (
        *("btd,edf->btef", (2, 3, 8), (3, 8, 2), (3, 2, 4)),
        *("edr,erf->edf", (0,), 1),
    ),
    "transposed": ("btf,df->btd", (2, 3, 4), (8, 2), (2, 4), "dr,rf->df", (0,), 0),
    "batch_kept": ("nbd,ndh->nbh", (3, 2, 8), (8, 2), (2, 3, 4), "dr,rnh->ndh", (1,), 0),
}


@pytest.mark.parametrize("name", EINSUMS)
def test_einsum(name):
    equation, x_shape, a_shape, b_shape, adapter, contract, batch = EINSUMS[name]
    x, a, b = draw(x_shape, a_shape, b_shape)
    y = lora_einsum(equation, x, a, b, contract, batch)
    x, a, b = double(x, a, b)
    w = np.einsum(adapter, a, b)
    np.testing.assert_allclose(y, np.einsum(equation, x, w), **TOLERANCE)
    # Sums of few float32 products: a few times 2**-24.
    np.testing.assert_allclose(
        lora_weight(*map(jnp.float32, (a, b)), contract, batch), w, rtol=1e-5
    )


def test_take():
    a, b = draw((8, 2), (2, 10))
    ids = jnp.array([[0, 9], [-1, 3]])
    table = np.einsum("dr,rv->vd", *double(a, b))
    np.testing.assert_allclose(lora_take(ids, a, b), table[np.asarray(ids)], **TOLERANCE)
    assert jnp.isnan(lora_take(jnp.array([10]), a, b)).all()


def test_results_have_the_inputs_dtype():
    x, a, b = draw((2, 8), (8, 2), (2, 4))
    x = x.astype(jnp.bfloat16)
    assert lora_matmul(x, a, b).dtype == jnp.bfloat16
    assert lora_einsum("bk,kn->bn", x, a, b, (0,)).dtype == jnp.bfloat16
    assert lora_take(jnp.array([1]), a, b, jnp.bfloat16).dtype == jnp.bfloat16


def test_bfloat16_runs_where_the_batch_axes_are_not_in_front():
    """XLA's CPU backend has no such product; alone of all `EINSUMS` this one would need it."""
    equation, x_shape, a_shape, b_shape, _, contract, batch = EINSUMS["one_x_for_experts"]
    x, a, b = draw(x_shape, a_shape, b_shape)
    y = jax.jit(lambda x: lora_einsum(equation, x, a, b, contract, batch))(x.astype(jnp.bfloat16))
    want = lora_einsum(equation, x, a, b, contract, batch)
    # Three roundings to 8 bits of numbers that reach 20.
    np.testing.assert_allclose(np.asarray(y, np.float32), want, rtol=0.02, atol=0.2)


def test_gradients_match_the_merged_product():
    x, a, b = draw((3, 8), (8, 2), (2, 4))
    loss = lambda f: lambda x, a, b: (f(x, a, b) ** 2).sum()  # noqa: E731
    got = jax.grad(loss(lora_matmul), argnums=(0, 1, 2))(x, a, b)
    want = jax.grad(loss(lambda x, a, b: x @ (a @ b)), argnums=(0, 1, 2))(x, a, b)
    for g, w in zip(got, want, strict=True):
        # float32 sums in another order, of squares that reach some 1000.
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-3)
