"""LoRA on NNX models of other libraries."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qjax
from qjax.nnx import QuantParam
from tests.swap.nnx_foreign_models import (
    CLOSE,
    DIM,
    EXPERTS,
    F32,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    IDS,
    VOCAB,
    WARNING,
    Einsum,
    Embedder,
    Model,
    quantized,
    weights,
)


class TestLora:
    def model(self, cfg=None):
        cfg = cfg or qjax.LoraConfig(rank=4, alpha=8)
        return qjax.add_lora(quantized(), cfg, rngs=nnx.Rngs(1))

    def test_shapes(self):
        model = self.model()
        attn, moe = model.layers[0].attn, model.layers[0].moe
        assert attn.qkv.w_lora_a.shape == (DIM, 4)
        assert attn.qkv.w_lora_b.shape == (4, 3, HEADS, HEAD_DIM)
        assert attn.o_proj.w_lora_a.shape == (HEADS, HEAD_DIM, 4)
        assert moe.up_lora_a.shape == (EXPERTS, DIM, 4)
        assert moe.up_lora_b.shape == (EXPERTS, 4, HIDDEN)
        np.testing.assert_allclose(model(IDS), quantized()(IDS), **CLOSE)  # B is zero

    def test_twenty_steps_and_back(self, mode, tmp_path):
        model = self.model()
        frozen = {path: np.asarray(v.q.packed) for path, v in weights(model).items()}
        graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
        tx = optax.adamw(1e-2)
        state = tx.init(lora)

        @jax.jit
        def step(lora, state):
            def loss_fn(lora):
                logits = nnx.merge(graphdef, lora, rest)(IDS)
                return -jax.nn.log_softmax(logits)[..., 7].mean()

            loss, grads = jax.value_and_grad(loss_fn)(lora)
            updates, state = tx.update(grads, state, lora)
            return optax.apply_updates(lora, updates), state, loss

        losses = []
        for _ in range(20):
            lora, state, loss = step(lora, state)
            losses.append(float(loss))
        assert losses[-1] < 0.5 * losses[0]
        model = nnx.merge(graphdef, lora, rest)
        assert all(np.any(v[...] != 0) for _, v in nnx.to_flat_state(lora))
        for path, variable in weights(model).items():
            np.testing.assert_array_equal(variable.q.packed, frozen[path])

        trained = model(IDS)
        merged = qjax.merge_lora(model, jnp.float32)
        assert type(merged.layers[0].attn.qkv) is Einsum
        assert not nnx.to_flat_state(nnx.state(merged, nnx.LoRAParam))
        # x (W + A B) against x W + (x A) B, after 20 steps of a large rate.
        np.testing.assert_allclose(merged(IDS), trained, rtol=1e-3, atol=1e-3)
        kept = qjax.dequantize_model(model)
        np.testing.assert_allclose(kept(IDS), trained, rtol=1e-3, atol=1e-3)

        qjax.save(tmp_path / "model", model)
        again = qjax.load(tmp_path / "model", like=self.model())
        np.testing.assert_array_equal(again(IDS), trained)
        qjax.save(tmp_path / "adapters", model, only="adapters")
        again = qjax.load(tmp_path / "adapters", like=self.model())
        np.testing.assert_array_equal(again(IDS), trained)
        other = self.model(qjax.LoraConfig(rank=4, alpha=9))
        with pytest.raises(ValueError, match=r"o_proj/w: expected scaling=2\.25, found 2"):
            qjax.load(tmp_path / "adapters", like=other)

    def test_nnx_update_reaches_weights_with_adapters(self):
        model, other = self.model(), Model(nnx.Rngs(5))
        with pytest.warns(UserWarning, match=WARNING):
            qjax.quantize_model(other, F32)
        variable = vars(model.layers[0].moe)["up"]
        nnx.update(model, nnx.state(other, QuantParam))
        assert vars(model.layers[0].moe)["up"] is variable
        np.testing.assert_array_equal(variable.q.packed, weights(other)["layers/0/moe/up"].q.packed)

    def test_patterns(self):
        model = self.model(qjax.LoraConfig(rank=4, include=["qkv$", "moe/up$"]))
        adapters = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
        assert {path[-1] for path, _ in adapters} == {
            *("w_lora_a", "w_lora_b", "up_lora_a", "up_lora_b")
        }
        model = qjax.add_lora(
            model, qjax.LoraConfig(rank=2, include="lm_head"), rngs=nnx.Rngs(1)
        )  # a float one
        assert model.lm_head.w_lora_a.shape == (DIM, 2)
        before = model(IDS)
        model.lm_head.w_lora_b[...] = jnp.ones((2, VOCAB))
        merged = qjax.merge_lora(model, jnp.float32)
        assert np.abs(model(IDS) - before).max() > 0.1
        np.testing.assert_allclose(merged(IDS), model(IDS), rtol=1e-3, atol=1e-3)

    def test_dropout(self):
        message = "layers/0/moe/down is decoded at each use, where its adapter can have no dropout"
        with pytest.raises(ValueError, match=message):
            self.model(qjax.LoraConfig(rank=4, dropout=0.5))
        model = self.model(qjax.LoraConfig(rank=4, dropout=0.5, exclude="moe"))
        qkv, x = model.layers[0].attn.qkv, jnp.ones((1, 2, DIM))
        qkv.w_lora_b[...] = jnp.ones(qkv.w_lora_b.shape)
        assert np.abs(qkv(x) - qkv(x)).max() > 0
        model = nnx.view(model, deterministic=True)
        qkv = model.layers[0].attn.qkv
        np.testing.assert_array_equal(qkv(x), qkv(x))

    def test_refusals(self):
        with pytest.raises(ValueError, match="layers/0/attn/qkv/w has an adapter already"):
            qjax.add_lora(self.model(), qjax.LoraConfig(include="qkv"), rngs=nnx.Rngs(0))


def test_rows_of_a_table_with_an_adapter():
    model = Embedder(nnx.Rngs(0))
    qjax.quantize_model(model, qjax.QuantConfig(include="embedding"))
    qjax.add_lora(model, qjax.LoraConfig(rank=4), rngs=nnx.Rngs(1))
    model.input_embedding_lora_b[...] = jnp.ones((4, VOCAB))
    merged = qjax.merge_lora(model, jnp.float32)
    ids, x = jnp.array([[0, -1], [VOCAB + 7, 3]]), jnp.ones((1, 2, DIM))
    # float32 sums in another order.
    np.testing.assert_allclose(model.encode(ids), merged.encode(ids), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.decode(x), merged.decode(x), rtol=1e-4, atol=1e-4)
