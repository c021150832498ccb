"""The NNX layers against float64 einsums of their decoded weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.nnx import QuantEmbed, QuantParam
from tests.nn.nnx_layers import CASES, F32, LORA, Case, build, call, inputs, oracle

BF16 = qjax.QuantConfig(block_size=32)


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def test_matches_float64(case):
    layer = build(case)
    y = call(layer, case, inputs(case))
    # K = 64 products accumulated in float32: an error of some 64 * 2**-24 of values near 1.
    np.testing.assert_allclose(y, oracle(layer, case, inputs(case)), rtol=1e-5, atol=1e-5)
    assert y.dtype == jnp.float32


def test_adapter_matches_float64(case):
    layer = build(case, lora=LORA)
    y = call(layer, case, inputs(case))
    # As above; the adapter adds values of some 20.
    np.testing.assert_allclose(y, oracle(layer, case, inputs(case)), rtol=1e-4, atol=1e-4)


def test_same_structure_as_flax(case):
    """The paths, shapes and attributes are those of Flax's layer."""
    layer = build(case)
    plain = layer.float_class(*case.args, **case.kwargs, rngs=nnx.Rngs(0))
    shapes = lambda m: {  # noqa: E731
        path: tuple(leaf.shape) for path, leaf in nnx.to_flat_state(nnx.state(m))
    }
    assert shapes(layer) == shapes(plain)
    assert set(vars(plain)) <= set(vars(layer))
    weight = getattr(layer, case.weight)
    assert type(weight) is QuantParam
    assert not isinstance(weight, nnx.Param)
    w = getattr(plain, case.weight)[...]
    # NF4 steps are at most 0.28 of a block's absmax, so no value is off by more than half that.
    assert jnp.abs(weight[...] - w).max() <= 0.15 * jnp.abs(w).max()


def test_from_float_copies(case):
    plain = case.make.float_class(*case.args, **case.kwargs, rngs=nnx.Rngs(0))
    layer = case.make.from_float(plain, F32)
    assert type(plain) is case.make.float_class
    assert isinstance(getattr(plain, case.weight), nnx.Param)
    y = call(layer, case, inputs(case))
    # As in test_matches_float64.
    np.testing.assert_allclose(y, oracle(layer, case, inputs(case)), rtol=1e-5, atol=1e-5)


def test_compute_dtype_leaves_the_result_dtype(case):
    """Products in bfloat16; the result is what Flax's own promotion gives."""
    layer = build(case, BF16, lora=LORA)
    x = inputs(case)
    y = call(layer, case, x)
    assert y.dtype == jnp.float32
    # Three roundings to bfloat16 (2**-9 each) of inputs, weights and the adapter's hidden values,
    # averaged over sums of 64: within 2 % of the largest value.
    want = oracle(layer, case, x)
    assert np.abs(np.asarray(y) - want).max() < 0.02 * np.abs(want).max()
    narrow = build(case, BF16, dtype=jnp.bfloat16)
    assert call(narrow, case, inputs(case, jnp.bfloat16)).dtype == jnp.bfloat16


def test_split_jit_and_gradients(case):
    layer = build(case, lora=LORA)
    x = inputs(case)
    graphdef, lora, rest = nnx.split(layer, nnx.LoRAParam, ...)

    @jax.jit
    def loss(lora, x):
        return (call(nnx.merge(graphdef, lora, rest), case, x) ** 2).sum()

    grads, dx = jax.grad(loss, argnums=(0, 1))(lora, x)
    # Against the decoded weight, by JAX's own rules.
    w = getattr(layer, case.weight).q.dequantize()

    def plain(lora, x):
        a, b = lora["lora_a"][...], lora["lora_b"][...]
        y = jnp.einsum(case.equation, x, w + LORA.scaling * jnp.einsum(case.adapter, a, b))
        bias = getattr(layer, "bias", None)
        if bias is not None:
            shape = bias.shape
            if case.kwargs.get("batch_axis") or case.equation.endswith("nth"):
                shape = (shape[0], 1, *shape[1:])
            y = y + bias[...].reshape((1,) * (y.ndim - len(shape)) + shape)
        return (y**2).sum()

    want, want_x = jax.grad(plain, argnums=(0, 1))(lora, x)
    for got, expected in zip(
        jax.tree.leaves((grads, dx)), jax.tree.leaves((want, want_x)), strict=True
    ):
        # float32 sums of some 64 terms in another order.
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


def test_eval_shape(case):
    abstract = nnx.eval_shape(lambda: build(case, lora=LORA))
    q = getattr(abstract, case.weight).q
    assert isinstance(q, qjax.QTensor)
    assert isinstance(q.packed, jax.ShapeDtypeStruct)
    assert q.shape == getattr(build(case), case.weight).shape


class TestEmbed:
    def layer(self, **kwargs):
        return build(CASES["embed_attend"], **kwargs)

    def test_lookup_with_adapter(self):
        layer = self.layer(lora=LORA)
        ids = jnp.array([[1, 9], [0, -1]])
        w = np.asarray(layer.embedding.q.dequantize(), np.float64)
        a, b = np.asarray(layer.lora_a[...]), np.asarray(layer.lora_b[...])
        w = w + LORA.scaling * np.einsum("dr,rv->vd", a, b)
        # Sums of 4 float32 products, and one more: some 4 * 2**-24.
        np.testing.assert_allclose(layer(ids), w[np.asarray(ids)], rtol=1e-5, atol=1e-5)

    def test_one_row_is_broadcast(self):
        layer = QuantEmbed(1, 64, config=F32, rngs=nnx.Rngs(0))
        plain = nnx.Embed(1, 64, rngs=nnx.Rngs(0))
        ids = jnp.array([0, 3])
        assert layer(ids).shape == plain(ids).shape
        np.testing.assert_array_equal(layer(ids)[0], layer(ids)[1])

    def test_out_of_range_is_nan_as_in_flax(self):
        assert jnp.isnan(self.layer()(jnp.array([10]))).all()

    def test_refuses_float_inputs(self):
        with pytest.raises(ValueError, match="inputs must be integers, got float32"):
            self.layer()(jnp.ones(3))
