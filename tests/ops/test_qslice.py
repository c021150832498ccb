"""Products with one slice of a stack, read in place, against the slice taken out; small ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core.qslice import QSlice
from qjax.ops.lora import block_diagonal, few_rows, lora_matmul


@pytest.fixture
def stack(key):
    w = jax.random.normal(key, (3, 64, 24))
    return qjax.quantize(w, qjax.QuantConfig(), contract_axes=(0,), batch_ndim=1)


@pytest.fixture(params=[1, 8], ids=["in place", "taken"])
def devices(request, monkeypatch):
    """Stacks are indexed in place where there is one device."""
    monkeypatch.setattr(jax, "device_count", lambda *_: request.param)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_slice_multiplies_as_the_tensor_it_stands_for(double_quant, devices, key):
    w = jax.random.normal(key, (3, 64, 24))
    config = qjax.QuantConfig(double_quant=double_quant)
    stack = qjax.quantize(w, config, contract_axes=(0,), batch_ndim=1)
    x = jax.random.normal(key, (2, 5, 64))

    @jax.jit
    def product(x, stack, index):
        return jax.value_and_grad(lambda x: jnp.sum(qjax.matmul(x, QSlice(stack, index)) ** 2))(x)

    for i in range(3):
        decoded = np.asarray(jax.tree.map(lambda a, i=i: a[i], stack).dequantize(), np.float64)
        value, gradient = product(x, stack, jnp.int32(i))
        y = np.asarray(x, np.float64) @ decoded
        # float32 sums of 64 products of size 1.
        np.testing.assert_allclose(value, (y**2).sum(), rtol=1e-5)
        np.testing.assert_allclose(gradient, 2 * y @ decoded.T, atol=1e-3)


def test_a_slice_scans_without_a_copy_of_the_stack(stack, devices):
    def body(x, i):
        return jnp.tanh(qjax.matmul(x, QSlice(stack, i))[:, :1] * x), None

    x = jnp.ones((2, 64))
    got, _ = jax.lax.scan(body, x, jnp.arange(3, dtype=jnp.int32))
    want = x
    for i in range(3):
        q = jax.tree.map(lambda a, i=i: a[i], stack)
        want = jnp.tanh((want @ q.dequantize())[:, :1] * want)
    np.testing.assert_allclose(got, want, atol=1e-5)  # float32


def test_a_slice_knows_its_shape_and_refuses_what_does_not_fit(stack, devices):
    q = QSlice(stack, jnp.int32(1))
    assert (q.shape, q.dtype) == ((64, 24), jnp.float32)
    np.testing.assert_array_equal(q.dequantize(), stack.dequantize()[1])
    with pytest.raises(ValueError, match=r"x must be \['...', 64\] to multiply"):
        qjax.matmul(jnp.ones((2, 32)), q)


@pytest.mark.parametrize("sections", [None, (5, 3, 4)])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_product_written_out_is_the_product(rows, sections, rng):
    count = len(sections or (12,))
    x = rng.normal(size=(rows, 16)).astype(np.float32)
    a = rng.normal(size=(16, count * 2)).astype(np.float32)
    b = rng.normal(size=(2, 12)).astype(np.float32)
    ends = np.cumsum(sections or (12,))
    parts = [
        x.astype(np.float64) @ a[:, 2 * i : 2 * i + 2] @ b[:, start:end]
        for i, (start, end) in enumerate(zip([0, *ends], ends))
    ]
    want = np.concatenate(parts, axis=1)
    y = lora_matmul(jnp.asarray(x), jnp.asarray(a), jnp.asarray(b), sections=sections)
    np.testing.assert_allclose(y, want, atol=1e-5)  # float32 sums of 16 terms
    np.testing.assert_allclose(
        few_rows(jnp.asarray(x @ a), jnp.asarray(b), sections), want, atol=1e-5
    )
    x, a, b = jnp.asarray(x), jnp.asarray(a), jnp.asarray(b)
    y = lora_matmul(x, a.T, b.T, sections=sections, by_columns=True)
    np.testing.assert_allclose(y, want, atol=1e-5)


def test_block_diagonals_of_a_stack(rng):
    b = jnp.asarray(rng.normal(size=(2, 1, 3)), jnp.float32)
    full = np.asarray(block_diagonal(b, (1, 2)))
    assert full.shape == (2, 2, 3)
    np.testing.assert_array_equal(full[:, 0, :1], b[:, 0, :1])
    np.testing.assert_array_equal(full[:, 1, 1:], b[:, 0, 1:])
    assert not full[:, 0, 1:].any() and not full[:, 1, :1].any()
