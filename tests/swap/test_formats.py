"""Whole models in the other formats: swapped, with LoRA, trained, saved."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qjax

FORMATS = ["int4_asym", "mxfp4", "nvfp4", "int8", "fp8_e4m3"]


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(32, 64, rngs=rngs)
        self.up = nnx.Linear(64, 96, rngs=rngs)
        self.down = nnx.Linear(96, 64, rngs=rngs)

    def __call__(self, ids):
        return self.embed.attend(self.down(nnx.gelu(self.up(self.embed(ids)))))


def config(format: str, **fields) -> qjax.QuantConfig:
    block_size = 32 if format == "int4_asym" else None  # which 96 is a multiple of
    return qjax.QuantConfig(format, block_size, compute_dtype=jnp.float32, **fields)


IDS = jnp.arange(12).reshape(2, 6)


@pytest.mark.parametrize("format", FORMATS)
def test_nnx_model(format, tmp_path):
    threshold = 6.0 if format == "int8" else None
    cfg = config(format, int8_threshold=threshold)
    model = qjax.quantize_model(Net(nnx.Rngs(0)), cfg)
    decoded = qjax.dequantize_model(qjax.quantize_model(Net(nnx.Rngs(0)), cfg))
    # LLM.int8() rounds the activations to 8 bits too: one part in 254 of the largest.
    atol = 0.05 if threshold else 1e-4
    np.testing.assert_allclose(model(IDS), decoded(IDS), atol=atol)
    rows = qjax.report(model).rows
    assert {row.format for row in rows if row.is_quantized} == {format}

    model = qjax.add_lora(model, qjax.LoraConfig(rank=4), rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            targets = optax.softmax_cross_entropy_with_integer_labels(model(IDS), IDS + 1)
            return targets.mean()

        loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    qjax.save(tmp_path / "model", model)
    like = qjax.add_lora(
        qjax.quantize_model(Net(nnx.Rngs(5)), cfg), qjax.LoraConfig(rank=4), rngs=nnx.Rngs(5)
    )
    np.testing.assert_array_equal(qjax.load(tmp_path / "model", like=like)(IDS), model(IDS))


@pytest.mark.parametrize("format", FORMATS)
def test_linen_params(format, tmp_path):
    net = nn.Sequential([nn.Dense(96), nn.gelu, nn.Dense(32)])
    x = jax.random.normal(jax.random.key(0), (4, 64))
    params = net.init(jax.random.key(1), x)["params"]
    qparams = qjax.quantize_params(params, config(format))
    want = net.apply({"params": qjax.dequantize_model(qparams)}, x)
    # Sums of 64 and 96 float32 products of numbers around 1, in another order.
    np.testing.assert_allclose(qjax.apply(net, {"params": qparams}, x), want, atol=1e-5)
    qjax.save(tmp_path / "params", qparams)
    loaded = qjax.load(tmp_path / "params", like=qparams)
    jax.tree.map(np.testing.assert_array_equal, loaded, qparams)


def test_a_format_for_each_path():
    cfg = qjax.QuantConfig(overrides={"down": {"format": "int8"}, "up": {"block_size": 32}})
    rows = {row.path: row for row in qjax.report(qjax.quantize_model(Net(nnx.Rngs(0)), cfg)).rows}
    assert rows["down/kernel"].format == "int8" and not rows["down/kernel"].double_quant
    assert rows["up/kernel"].format == "nf4" and rows["up/kernel"].block_size == 32
