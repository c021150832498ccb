"""Fused projections against the single layers they stand for, and attention with one query."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.models.attention import attend
from qjax.models.context import Context
from tests.models.golden import FOLDER, golden_model, reference

CONFIG = qjax.QuantConfig(compute_dtype=jnp.float32)
forward = nnx.jit(lambda model, ids: model(ids))


def load(family="llama", config=CONFIG, **options):
    return qjax.from_pretrained(FOLDER / family / "hf", config=config, **options)


def with_adapters(model):
    """Adapters that do something."""
    model = qjax.add_lora(model, qjax.LoraConfig(rank=2, alpha=3), rngs=nnx.Rngs(0))
    adapters = nnx.state(model, nnx.LoRAParam)
    leaves = jax.tree.leaves(adapters)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    fresh = [0.1 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves)]
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(adapters), fresh))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])
def test_a_fused_model_computes_and_generates_the_same_and_splits_again(scan_layers):
    model, ids = with_adapters(load(scan_layers=scan_layers)), reference("llama")["input_ids"]
    want, text = forward(model, ids), model.generate(ids, max_new_tokens=4)
    qjax.fuse_projections(model)
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))]
    assert not any("/q_proj" in path or "/up_proj" in path for path in paths)
    # float32 sums in another order.
    np.testing.assert_allclose(forward(model, ids), want, atol=1e-4)
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=4), text)
    qjax.split_projections(model)
    np.testing.assert_allclose(forward(model, ids), want, atol=1e-4)


def test_adapters_added_after_have_the_sizes_of_the_single_layers():
    model = with_adapters(qjax.fuse_projections(load()))
    hidden, qkv = model.config.hidden_size, model.layers[0].self_attn.qkv_proj
    assert qkv.lora_a.shape == (hidden, 3 * 2)
    assert qkv.lora_b.shape == (2, sum(qkv.sections))
    # The adapter of the second section alone reaches the outputs of the second section alone.
    x = jax.random.normal(jax.random.key(0), (3, hidden))
    start, end = np.cumsum(qkv.sections)[:2]
    a, b = np.asarray(qkv.lora_a[...], np.float64), np.asarray(qkv.lora_b[...], np.float64)
    want = 1.5 * np.asarray(x, np.float64) @ a[:, 2:4] @ b[:, start:end]
    qkv_alone = qjax.split_projections(model).layers[0].self_attn.k_proj
    base = x @ qkv_alone.kernel.q.dequantize(jnp.float32)
    # float32 sums of 64 terms.
    np.testing.assert_allclose(np.asarray(qkv_alone(x) - base), want, atol=1e-4)


def test_merged_and_fused_is_fused_and_merged():
    ids = reference("llama")["input_ids"]
    one = qjax.merge_lora(qjax.fuse_projections(with_adapters(load())), dtype=jnp.float32)
    other = qjax.merge_lora(with_adapters(load()), dtype=jnp.float32)
    np.testing.assert_allclose(forward(one, ids), forward(other, ids), atol=1e-4)  # float32


def test_fused_before_it_is_quantized_keeps_8_bit_scales():
    model = qjax.quantize_model(qjax.fuse_projections(load(config=None)), CONFIG)
    q = model.layers[0].self_attn.qkv_proj.kernel.q
    assert q.double_quant
    late = qjax.fuse_projections(load()).layers[0].self_attn.qkv_proj.kernel.q
    assert not late.double_quant
    np.testing.assert_array_equal(q.packed, late.packed)


def test_a_fused_model_is_saved_and_loaded(tmp_path):
    model, ids = qjax.fuse_projections(with_adapters(load())), reference("llama")["input_ids"]
    qjax.save(tmp_path / "checkpoint", model)
    again = qjax.load(tmp_path / "checkpoint", like=qjax.fuse_projections(with_adapters(load())))
    np.testing.assert_array_equal(forward(again, ids), forward(model, ids))


def test_misuse_is_named(tmp_path):
    model = load()
    with pytest.raises(ValueError, match="CausalLM has no fused projections"):
        qjax.split_projections(model)
    qjax.fuse_projections(model)
    with pytest.raises(ValueError, match="CausalLM has no projections to fuse"):
        qjax.fuse_projections(model)
    with pytest.raises(ValueError, match=r"save_pretrained .* call qjax.split_projections first"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"save_adapter .* call qjax.split_projections first"):
        qjax.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"load_adapter .* call qjax.split_projections first"):
        qjax.load_adapter(model, FOLDER / "llama" / "adapter_lora")
    with pytest.raises(NotImplementedError, match="Seq2SeqLM has no stack of blocks of its own"):
        qjax.fuse_projections(golden_model("t5"))
    mixed = qjax.QuantConfig(overrides={"k_proj": {"block_size": 32}})
    with pytest.raises(ValueError, match=r"0/self_attn/k_proj differ in block_size: 64 and 32"):
        qjax.fuse_projections(load(config=mixed))


def test_a_model_that_cannot_be_fused_stays_as_it_was():
    mixed = dataclasses.replace(CONFIG, overrides={"1/mlp/up_proj": {"block_size": 32}})
    model, ids = load(config=mixed), reference("llama")["input_ids"]
    want = forward(model, ids)
    with pytest.raises(ValueError, match=r"1/mlp/up_proj differ in block_size: 64 and 32"):
        qjax.fuse_projections(model)
    np.testing.assert_array_equal(forward(model, ids), want)


@pytest.mark.slow
def test_dora_is_fused_with_its_magnitudes():
    lora = qjax.LoraConfig(rank=2, alpha=3, dora=True)
    model, ids = qjax.add_lora(load(), lora, rngs=nnx.Rngs(0)), reference("llama")["input_ids"]
    for i, (path, leaf) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))):
        noise = 0.1 * jax.random.normal(jax.random.key(i), leaf.shape)
        leaf.set_value(leaf[...] * (1 + noise) if "lora_magnitude" in path else noise)
    want = forward(model, ids)
    np.testing.assert_allclose(forward(qjax.fuse_projections(model), ids), want, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_one_query_is_attention(kv_heads, rng):
    q = rng.normal(size=(3, 1, 4, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 3, 10, kv_heads, 8)).astype(np.float32)
    mask = rng.random((3, 1, 1, 10)) < 0.6
    mask[..., 0] = True
    out = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), Context(mask=jnp.asarray(mask)))
    wide = [np.repeat(a.astype(np.float64), 4 // kv_heads, axis=2) for a in (k, v)]
    logits = np.einsum("bthd,bshd->bhts", q, wide[0]) / np.sqrt(8)
    p = np.where(mask, np.exp(logits), 0)
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(out, np.einsum("bhts,bshd->bthd", p, wide[1]), atol=1e-5)  # float32
