"""Surgery on NNX layers that are not just a product: subclasses, convolutions, norms of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.nnx import QuantConv
from tests.swap.nnx_models import F32


class Scaled(nnx.Linear):
    """A foreign layer with code of its own."""

    def __call__(self, x):
        return 2.0 * (x @ self.kernel[...])


def test_foreign_subclass_reads_a_decoded_weight():
    model = nnx.Sequential(Scaled(64, 8, rngs=nnx.Rngs(0)), nnx.relu)
    with pytest.warns(UserWarning, match=r"decode their whole 4-bit weight .*: layers/0/kernel"):
        qjax.quantize_model(model, F32)
    layer, x = model.layers[0], jnp.ones((2, 64))
    assert type(layer) is Scaled
    np.testing.assert_array_equal(layer(x), 2.0 * (x @ layer.kernel.q.dequantize()))
    qjax.add_lora(model, qjax.LoraConfig(rank=4, include="layers/0"), rngs=nnx.Rngs(0))
    layer.kernel_lora_b[...] = jnp.ones((4, 8))
    merged = qjax.merge_lora(model, jnp.float32).layers[0]
    assert type(merged) is Scaled
    # One program computes W + scaling * A B, another x times it: a few times 2**-24.
    np.testing.assert_allclose(layer(x), merged(x), rtol=1e-6)
    assert np.abs(layer(x) - 2.0 * (x @ layer.kernel.q.dequantize())).max() > 0.1


def test_convolutions_that_are_matmuls():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Conv(3, 64, (3, 3), rngs=rngs),
        nnx.Conv(64, 48, (1, 1), strides=2, rngs=rngs),
        nnx.Conv(48, 64, (1, 1), padding="VALID", use_bias=False, rngs=rngs),
        nnx.Conv(64, 64, (1, 1), feature_group_count=2, rngs=rngs),
    )
    plain = nnx.clone(model)
    qjax.quantize_model(model, F32)
    kinds = [type(layer) for layer in model.layers]
    assert kinds == [nnx.Conv, QuantConv, QuantConv, nnx.Conv]
    for layer, other in zip(model.layers[1:3], plain.layers[1:3], strict=True):
        other.kernel.set_value(layer.kernel.q.dequantize())
    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 3))
    # float32 sums in another order.
    np.testing.assert_allclose(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert qjax.report(model)["layers/0/kernel"].note == "convolutions are kept"
    with pytest.raises(ValueError, match=r"kernel_size=\(3, 3\) is no matmul"):
        QuantConv(64, 8, (3, 3), rngs=rngs)


def test_normalized_weights_are_left_alone():
    layer, x = nnx.WeightNorm(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)), jnp.ones(64)
    before = layer(x)
    qjax.quantize_model(layer)
    assert type(layer.layer_instance) is nnx.Linear
    # It normalizes what the last call left, so a second call rounds once more.
    np.testing.assert_allclose(layer(x), before, rtol=1e-5)
    note = qjax.report(layer)["layer_instance/kernel"].note
    assert note == "its weight is normalized at each call"


def test_own_product_is_kept():
    calls = []

    def product(*args, **kwargs):
        calls.append(args)
        return jax.lax.dot_general(*args, **kwargs)

    layer = nnx.Linear(64, 8, dot_general=product, rngs=nnx.Rngs(0))
    with pytest.warns(UserWarning, match="products of their own"):
        qjax.quantize_model(layer, F32)
    layer(jnp.ones((2, 64)))
    assert len(calls) == 1
