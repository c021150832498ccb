"""add_lora, merge_lora and dequantize_model on an NNX model."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.nnx import LoraLinear
from tests.swap.nnx_models import F32, IDS, QUANTIZED, Model, modules, quantized


class TestLora:
    cfg = qjax.LoraConfig(rank=4, alpha=12)

    def model(self, cfg=None, quant=F32):
        model = qjax.quantize_model(Model(nnx.Rngs(0)), quant)
        return qjax.add_lora(model, cfg or self.cfg, rngs=nnx.Rngs(1))

    def test_every_quantized_layer_and_no_other(self, mode):
        model = self.model()
        adapters = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
        paths = {"/".join(map(str, path)) for path, _ in adapters}
        assert paths == {f"{p}/lora_{x}" for p in QUANTIZED for x in "ab"}
        plain = qjax.quantize_model(Model(nnx.Rngs(0)), F32)
        np.testing.assert_array_equal(model(IDS), plain(IDS))  # B is zero

    def test_include_and_exclude(self):
        model = self.model(qjax.LoraConfig(4, include="attn", exclude="attn/(key|value)$"))
        have = {p for p, m in modules(model).items() if getattr(m, "lora_a", None) is not None}
        assert have == {f"blocks/{i}/attn/{n}" for i in range(2) for n in ("query", "out")}

    def test_on_a_float_layer_that_is_asked_for(self):
        model = self.model(qjax.LoraConfig(4, include=["lm_head", "embed"]))
        assert type(model.lm_head) is LoraLinear
        plain = qjax.quantize_model(Model(nnx.Rngs(0)), F32)
        np.testing.assert_array_equal(model(IDS), plain(IDS))
        for layer in (model.lm_head, model.embed):
            layer.lora_b[...] = jax.random.normal(jax.random.key(0), layer.lora_b.shape)
        merged = qjax.merge_lora(model, jnp.float32)
        assert type(merged.lm_head) is nnx.Linear
        # float32 sums in another order.
        np.testing.assert_allclose(merged(IDS), model(IDS), rtol=1e-3, atol=1e-3)

    def test_merge_is_exact(self, mode):
        model = self.model(quant=qjax.QuantConfig(compute_dtype=jnp.float32))
        for path in QUANTIZED:
            layer = modules(model)[path]
            layer.lora_b[...] = 0.1 * jax.random.normal(jax.random.key(0), layer.lora_b.shape)
        before = np.asarray(model(IDS))
        merged = qjax.merge_lora(model, dtype=jnp.float32)
        layer, plain = model.blocks[0].attn.out, merged.blocks[0].attn.out
        assert type(plain) is nnx.LinearGeneral
        assert {type(m) for m in modules(merged).values()} == {
            type(m) for m in modules(Model(nnx.Rngs(0))).values()
        }
        w = np.asarray(layer.kernel.q.dequantize(), np.float64)
        a, b = np.asarray(layer.lora_a[...], np.float64), np.asarray(layer.lora_b[...], np.float64)
        # One float32 sum of numbers below 1: a few units in the last place.
        np.testing.assert_allclose(
            plain.kernel[...], w + 3.0 * np.einsum("nhr,rd->nhd", a, b), atol=1e-6
        )
        np.testing.assert_allclose(merged(IDS), before, rtol=1e-3, atol=1e-3)
        narrow = qjax.merge_lora(model).blocks[0].attn.out
        assert narrow.kernel.dtype == narrow.bias.dtype == jnp.bfloat16
        np.testing.assert_array_equal(model(IDS), before)  # the model keeps its adapters
        assert layer.bias.dtype == jnp.float32

    def test_dequantize_keeps_adapters(self):
        model = self.model()
        plain = qjax.dequantize_model(model)
        assert type(plain.by_name["out"]) is LoraLinear
        assert plain.by_name["out"].kernel.dtype == jnp.float32
        # The same sums in float32, in another order.
        np.testing.assert_allclose(plain(IDS), model(IDS), rtol=1e-4, atol=1e-4)
        again = qjax.quantize_model(plain, F32)
        assert quantized(again) == QUANTIZED
        assert again.by_name["out"].lora_a is not None

    def test_refusals(self):
        model = self.model()
        with pytest.raises(ValueError, match="by_name/out has an adapter already"):
            qjax.add_lora(model, qjax.LoraConfig(include="by_name"), rngs=nnx.Rngs(0))
        with pytest.raises(
            ValueError, match=r"include=.q_proj. matches no dense layer; there are:"
        ):
            qjax.add_lora(model, qjax.LoraConfig(include="q_proj"), rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"no layer is in 4 bits, .*call quantize_model"):
            qjax.add_lora(Model(nnx.Rngs(0)), self.cfg, rngs=nnx.Rngs(0))
        with pytest.raises(TypeError, match="cfg must be a LoraConfig, got 8"):
            qjax.add_lora(model, 8, rngs=nnx.Rngs(0))
        with pytest.raises(TypeError, match=re.escape("rngs must be an nnx.Rngs, got int")):
            qjax.add_lora(model, self.cfg, rngs=0)
        with pytest.raises(ValueError, match="Linear has no layer in 4 bits"):
            qjax.merge_lora(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
        with pytest.raises(TypeError, match="got list"):
            qjax.dequantize_model([])

    def test_linen_trees(self):
        params = qjax.quantize_params({"dense": {"kernel": jnp.ones((64, 8))}})
        w = params["dense"]["kernel"].q.dequantize()
        np.testing.assert_array_equal(qjax.dequantize_model(params)["dense"]["kernel"], w)
        assert qjax.merge_lora(params)["dense"]["kernel"].dtype == jnp.bfloat16

    def test_norms_hold_no_adapter(self):
        message = "include='norm' matches no dense layer"
        with pytest.raises(ValueError, match=message):
            qjax.add_lora(self.model(), qjax.LoraConfig(include="norm"), rngs=nnx.Rngs(0))
