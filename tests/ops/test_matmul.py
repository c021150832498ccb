"""matmul and einsum against float64 NumPy on the decoded weight, under every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.ops.matmul import parse

# Products of K terms in float32: K * 2**-24 of the sum of magnitudes at worst, about its square
# root in practice; 1e-5 of the result's size holds for K up to 1024. bfloat16 rounds operands and
# result to 8 bits: 2**-8 of the largest.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2.0**-8}
CASES = [
    ("...d,df->...f", (2, 3, 64), (64, 8), (0,)),
    ("btd,dnh->btnh", (2, 3, 128), (128, 2, 4), (0,)),
    ("btnh,nhd->btd", (2, 3, 2, 32), (2, 32, 6), (0, 1)),
    ("bd,vd->bv", (2, 64), (10, 64), (1,)),
    ("bv,vd->bd", (2, 10), (10, 64), (1,)),  # the transposed product
    ("etd,edf->etf", (3, 2, 64), (3, 64, 5), (0,)),  # experts
    ("ted,edf->tef", (2, 3, 64), (3, 64, 5), (0,)),
    ("td,df->tf", (2, 100), (100, 7), (0,)),  # flat layout
    ("tf,df->td", (2, 7), (100, 7), (0,)),
    ("d,df->f", (64,), (64, 8), (0,)),
]


def make(rng, shape, contract, batch=0, dtype=jnp.float32, **config):
    w = jnp.asarray(rng.standard_normal(shape), dtype)
    return qjax.quantize(w, qjax.QuantConfig(**config), contract, batch_ndim=batch)


def close(actual, expected, dtype=jnp.float32):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=0, atol=TOLERANCE[dtype] * scale
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("equation, x_shape, w_shape, contract", CASES)
def test_einsum_and_its_gradient(rng, equation, x_shape, w_shape, contract, dtype):
    batch = 1 if "e" in equation else 0
    q = make(rng, w_shape, contract, batch, double_quant=batch == 0)
    x = jnp.asarray(rng.standard_normal(x_shape), dtype)
    w = np.asarray(q.dequantize(), np.float64)
    expected = np.einsum(equation, np.asarray(x, np.float64), w)
    y, pullback = jax.vjp(lambda x: qjax.einsum(equation, x, q), x)
    assert y.dtype == dtype
    close(y, expected, dtype)
    g = jnp.asarray(rng.standard_normal(y.shape), dtype)
    (dx,) = pullback(g)
    x_term, rest = equation.split(",")
    w_term, out_term = rest.split("->")
    expected = np.einsum(f"{out_term},{w_term}->{x_term}", np.asarray(g, np.float64), w)
    close(dx, expected, dtype)


def test_an_equation_that_cannot_use_the_packed_rows_decodes_and_says_so(rng):
    q = make(rng, (64, 3, 5), (0,))
    x = jnp.asarray(rng.standard_normal((2, 64)), jnp.float32)
    with pytest.warns(UserWarning, match="'bd,dnh->bn' does not sum over the axes"):
        y = qjax.einsum("bd,dnh->bn", x, q)
    close(y, np.einsum("bd,dnh->bn", np.float64(x), np.float64(q.dequantize())))


@pytest.mark.parametrize("m", [1, 5, 300])
@pytest.mark.parametrize("shape", [(128, 7), (1344, 48)])  # 1344 = 21 blocks
def test_matmul_of_any_number_of_rows(rng, m, shape):
    q = make(rng, shape, (0,))
    x = jnp.asarray(rng.standard_normal((m, shape[0])), jnp.float32)
    close(qjax.matmul(x, q), np.float64(x) @ np.float64(q.dequantize()))


def test_matmul_with_batch_axes_and_no_rows(rng):
    q = make(rng, (3, 64, 5), (0,), batch=1)
    x = jnp.asarray(rng.standard_normal((3, 2, 4, 64)), jnp.float32)
    expected = np.einsum("ebtk,ekn->ebtn", np.float64(x), np.float64(q.dequantize()))
    close(qjax.matmul(x, q), expected)
    one = np.einsum("btk,ekn->bent", np.float64(x[0]), np.float64(q.dequantize()))
    close(qjax.einsum("btk,ekn->bent", x[0], q), one)  # one x for all slices
    assert qjax.matmul(jnp.zeros((3, 0, 64)), q).shape == (3, 0, 5)


def test_transformations(rng):
    """jit, vmap over x, vmap over weights, scan and remat give what a loop gives."""
    stack = make(rng, (3, 64, 64), (0,), batch=1)
    layers = [jax.tree.map(lambda a, i=i: a[i], stack) for i in range(3)]
    x = jnp.asarray(rng.standard_normal((4, 64)) / 8, jnp.float32)
    looped = functools.reduce(lambda x, q: jnp.tanh(qjax.matmul(x, q)), layers, x)

    @jax.jit
    def scanned(x, stack):
        body = jax.checkpoint(lambda x, q: (jnp.tanh(qjax.matmul(x, q)), None))
        return jax.lax.scan(body, x, stack)[0]

    # The same operations in another order of fusion: a few units in the last place of values < 1.
    np.testing.assert_allclose(scanned(x, stack), looped, rtol=0, atol=1e-6)
    grad = jax.grad(lambda x: scanned(x, stack).sum())(x)
    looped_grad = jax.grad(
        lambda x: functools.reduce(lambda x, q: jnp.tanh(qjax.matmul(x, q)), layers, x).sum()
    )(x)
    ulps = 1e-6 * np.abs(looped_grad).max()
    np.testing.assert_allclose(grad, looped_grad, rtol=0, atol=ulps)
    rows = jax.vmap(lambda row: qjax.matmul(row, layers[0]))(x)
    np.testing.assert_allclose(rows, qjax.matmul(x, layers[0]), rtol=0, atol=1e-5)
    experts = jax.vmap(qjax.matmul, in_axes=(None, 0))(x, stack)
    for i in range(3):
        np.testing.assert_allclose(experts[i], qjax.matmul(x, layers[i]), rtol=0, atol=1e-5)


def test_the_weight_has_no_gradient(rng):
    q = make(rng, (64, 8), (0,))
    grads = jax.grad(lambda q: qjax.matmul(jnp.ones((1, 64)), q).sum(), allow_int=True)(q)
    assert grads.packed.dtype == jax.dtypes.float0
    assert not np.any(grads.scales.absmax)


def test_residuals_hold_nothing_decoded(rng):
    """What the forward pass of a stack keeps for the backward is the activations, no weights."""
    layers, width = 8, 256
    stack = make(rng, (layers, width, width), (0,), batch=1)
    x = jnp.ones((2, width))

    def loss(x, stack):
        return jax.lax.scan(lambda x, q: (jnp.tanh(qjax.matmul(x, q)), None), x, stack)[0].sum()

    _, pullback = jax.eval_shape(lambda x, s: jax.vjp(lambda x: loss(x, s), x), x, stack)
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))
    activations = 4 * x.size * 4 * layers  # a few arrays of x's size a layer
    assert kept <= stack.nbytes + activations
    # And as compiled: temporaries hold one decoded layer (twice), not eight.
    compiled = jax.jit(jax.grad(loss)).lower(x, stack).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 4 * width * width + activations


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x, q: qjax.matmul(x[:, :63], q), ValueError, r"x must be \['...', 64\].*\(2, 63\)"),
        (lambda x, q: qjax.matmul(x.astype(jnp.int32), q), TypeError, "x must be floating"),
        (lambda x, q: qjax.matmul(x, x), TypeError, "q must be a QTensor, got"),
        (lambda x, q: qjax.matmul(x, q, implementation="cuda"), ValueError, "implementation"),
        (lambda x, q: qjax.einsum("bk,kn->bn", x[:, 1:], q), ValueError, "axis 'k' is 63 in x"),
        (lambda x, q: qjax.einsum("bk,kn", x, q), ValueError, "must be 'x,q->out'"),
        (lambda x, q: qjax.einsum("bkc,kn->bn", x, q), ValueError, "does not fit operands of rank"),
        (lambda x, q: qjax.einsum("bk,kn->bm", x, q), ValueError, r"result axes \['m'\]"),
        (lambda x, q: qjax.einsum("bb,kn->bn", x, q), ValueError, "must name each axis once"),
    ],
)
def test_misuse(call, error, message):
    q = qjax.quantize(jnp.ones((64, 8)))
    with pytest.raises(error, match=message):
        call(jnp.ones((2, 64)), q)


def test_parse_expands_the_ellipsis():
    assert parse("...d,df->...f", 4, 2) == (
        ["0", "1", "2", "d"],
        ["d", "f"],
        ["0", "1", "2", "f"],
    )
