"""The NNX layers under scan, remat and vmap, and their dropout in training and evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax.nn.lora import LoraConfig
from qjax.nnx import QuantLinear
from tests.nn.nnx_layers import CASES, F32, LORA, build, oracle


class TestTransforms:
    def stack(self, lora=None, n=3):
        @nnx.split_rngs(splits=n)
        @nnx.vmap
        def make(rngs):
            return QuantLinear(32, 32, config=F32, lora=lora, rngs=rngs)

        layer = make(nnx.Rngs(0, dropout=1))
        if lora is not None:
            layer.lora_b[...] = 0.1 * jax.random.normal(jax.random.key(5), layer.lora_b.shape)
        return layer

    @pytest.mark.parametrize("remat", [False, True])
    def test_scan_over_layers(self, remat):
        stacked = self.stack(LORA)
        assert stacked.kernel.q.shape == (3, 32, 32)
        assert stacked.lora_a.shape == (3, 32, 4)
        apply = nnx.remat(lambda layer, x: layer(x)) if remat else (lambda layer, x: layer(x))

        @nnx.jit
        def forward(stacked, x):
            return nnx.scan(apply, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(stacked, x)

        x = jax.random.normal(jax.random.key(0), (2, 32))
        y = forward(stacked, x)
        want = np.asarray(x, np.float64)
        w = np.asarray(stacked.kernel.q.dequantize(), np.float64)
        a, b = np.asarray(stacked.lora_a[...]), np.asarray(stacked.lora_b[...])
        for i in range(3):
            want = want @ (w[i] + LORA.scaling * a[i] @ b[i])
        # Three float32 products of K = 32, whose values an adapter makes some 20.
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)

    def test_vmap_over_stacked_layers(self):
        stacked = self.stack()
        x = jax.random.normal(jax.random.key(0), (3, 2, 32))
        y = nnx.vmap(lambda layer, x: layer(x))(stacked, x)
        want = np.einsum("lbk,lkn->lbn", x, stacked.kernel.q.dequantize())
        # K = 32 float32 products in another order: some 32 * 2**-24.
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)

    def test_dropout_in_a_scan(self):
        stacked = self.stack(LoraConfig(rank=4, alpha=12, dropout=0.5))
        run = nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        x = jnp.ones((2, 32))
        assert not jnp.array_equal(run(stacked, x), run(stacked, x))


class TestDropout:
    def layer(self):
        return build(CASES["linear"], lora=LoraConfig(rank=4, alpha=12, dropout=0.5))

    def test_train_and_eval_modes(self):
        layer, x = self.layer(), jnp.ones((2, 64))
        assert not jnp.array_equal(layer(x), layer(x))
        layer.eval()
        np.testing.assert_array_equal(layer(x), layer(x))
        # As test_adapter_matches_float64.
        np.testing.assert_allclose(
            layer(x), oracle(layer, CASES["linear"], x[:, None])[:, 0], rtol=1e-4, atol=1e-4
        )
        layer.train()
        assert not jnp.array_equal(layer(x), layer(x))

    def test_view(self):
        layer, x = self.layer(), jnp.ones((2, 64))
        view = nnx.view(layer, deterministic=True)
        np.testing.assert_array_equal(view(x), view(x))
        assert not jnp.array_equal(layer(x), layer(x))

    def test_acts_on_the_adapter_alone(self):
        layer, x = self.layer(), jnp.ones((2, 64))
        layer.lora_b[...] = jnp.zeros_like(layer.lora_b)
        np.testing.assert_array_equal(layer(x), layer(x))

    def test_mean_is_kept(self):
        layer = self.layer()
        x = jnp.ones((4000, 64))
        mean = np.asarray(layer(x)).mean(0)
        layer.eval()
        want = np.asarray(layer(x[:1]))[0]
        # 4000 samples of values with a deviation near 15: a mean within 5 * 15 / sqrt(4000).
        np.testing.assert_allclose(mean, want, atol=1.2)
