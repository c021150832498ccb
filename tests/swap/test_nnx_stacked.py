"""Surgery on NNX layers that nnx.vmap stacked and nnx.scan runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.nnx import QuantParam
from tests.swap.nnx_models import F32


class Stack(nnx.Module):
    """Two blocks made by nnx.vmap, run by nnx.scan."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def make(rngs):
            return nnx.Sequential(
                nnx.Linear(32, 64, rngs=rngs),
                nnx.relu,
                nnx.LinearGeneral((64,), (2, 16), rngs=rngs),
            )

        self.layers = make(rngs)

    def __call__(self, x):
        def step(layer, x):
            return layer(x).reshape(x.shape)

        return nnx.scan(nnx.remat(step), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)


class Named(nnx.Module):
    """Two layers stacked and scanned as an `nnx.StateAxes` says."""

    def __init__(self, axis, axes):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=nnx.StateAxes({nnx.Param: axis, ...: 0}))
        def make(rngs):
            return nnx.Linear(32, 32, rngs=rngs)

        self.layers, self.axes = make(nnx.Rngs(0)), axes

    def __call__(self, x):
        def step(layer, x):
            return layer(x)

        return nnx.scan(step, in_axes=(self.axes, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)


def test_stacks_whose_axes_are_named_by_type():
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    both = nnx.StateAxes({(nnx.Param, QuantParam): 0, ...: None})
    model = qjax.quantize_model(Named(0, both), F32)
    model = qjax.add_lora(model, qjax.LoraConfig(rank=2), rngs=nnx.Rngs(1))
    decoded = np.float64(model.layers.kernel.q.dequantize())
    # float32 sums of 32 products, of numbers around 1.
    np.testing.assert_allclose(model(x), x @ decoded[0] @ decoded[1], rtol=1e-5, atol=1e-5)

    model = qjax.quantize_model(Named(0, nnx.StateAxes({nnx.Param: 0, ...: None})), F32)
    with pytest.raises(ValueError, match=r"whole stack of weights, \[2\] .*qjax.nnx.QuantParam"):
        model(x)

    with pytest.warns(UserWarning, match=r"kernel: shape \(32, 2, 32\) .*; stack layers along axi"):
        model = qjax.quantize_model(Named(1, nnx.StateAxes({nnx.Param: 1, ...: 0})), F32)
    assert "stack layers along axis 0" in qjax.report(model)["layers/kernel"].note


def test_stacked_layers(mode):
    model = Stack(nnx.Rngs(0))
    floats = np.asarray(model.layers.layers[0].kernel[...])
    model = qjax.quantize_model(model, F32)
    first, second = model.layers.layers[0].kernel.q, model.layers.layers[2].kernel.q
    assert first.shape == (2, 32, 64)
    assert first.batch_shape == (2,)
    assert second.shape == (2, 64, 2, 16)
    for i in range(2):  # each slice on its own
        alone = qjax.quantize(jnp.asarray(floats[i]), F32)
        np.testing.assert_array_equal(first.packed[i], alone.packed)
    x = jnp.ones((3, 32))
    want = x
    w, v = first.dequantize(), second.dequantize()
    for i in range(2):
        want = (jax.nn.relu(want @ w[i]) @ v[i].reshape(64, 32)).reshape(x.shape)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, x), want, rtol=1e-4, atol=1e-5)
    model = qjax.add_lora(model, qjax.LoraConfig(rank=4, dropout=0.5), rngs=nnx.Rngs(1))
    assert model.layers.layers[2].lora_a.shape == (2, 64, 4)
    assert model.layers.layers[2].lora_b.shape == (2, 4, 2, 16)
    a = model.layers.layers[0].lora_a[...]
    assert not jnp.array_equal(a[0], a[1])
    np.testing.assert_allclose(model(x), want, rtol=1e-4, atol=1e-5)
