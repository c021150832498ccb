"""Training with rounded weights: what is rounded, what gets gradients, and that it helps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qjax

CONFIG = qjax.QuantConfig(block_size=64, compute_dtype=jnp.float32)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(64, 64, rngs=rngs)
        self.down = nnx.Linear(64, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


X = jax.random.normal(jax.random.key(0), (256, 64))


@pytest.mark.parametrize("format", ["nf4", "int4_asym", "mxfp4", "nvfp4", "int8", "fp8_e5m2"])
def test_inside_the_model_is_the_quantized_one(format):
    cfg = qjax.QuantConfig(format=format, compute_dtype=jnp.float32)
    model = Net(nnx.Rngs(0))
    before = model(X)
    with qjax.fake_quantized(model, cfg):
        inside = model(X)
    quantized = qjax.dequantize_model(qjax.quantize_model(nnx.clone(model), cfg))
    # The mean of double quantization may be summed in another order under jit.
    np.testing.assert_allclose(inside, quantized(X), atol=1e-5)
    np.testing.assert_array_equal(model(X), before)


def test_gradients_are_those_of_a_float_layer_at_the_rounded_weights():
    model = Net(nnx.Rngs(0))

    def loss(model):
        with qjax.fake_quantized(model, CONFIG):
            return (model(X) ** 2).mean()

    found = nnx.grad(loss)(model)
    rounded = qjax.dequantize_model(qjax.quantize_model(nnx.clone(model), CONFIG))
    wanted = nnx.grad(lambda model: (model(X) ** 2).mean())(rounded)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        # The same float32 sums, in another order.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_an_adapter_is_rounded_with_its_weight_and_gets_the_gradient():
    include = qjax.LoraConfig(rank=4, include="up|down")
    model = qjax.add_lora(Net(nnx.Rngs(0)), include, rngs=nnx.Rngs(1))
    model.up.lora_b[...] = jax.random.normal(jax.random.key(2), model.up.lora_b.shape)
    merged = qjax.merge_lora(model, dtype=jnp.float32)
    quantized = qjax.dequantize_model(qjax.quantize_model(merged, CONFIG))
    with qjax.fake_quantized(model, CONFIG):
        inside = model(X)
    # The same float32 sums, in another order.
    np.testing.assert_allclose(inside, quantized(X), atol=1e-4)

    def loss(model):
        with qjax.fake_quantized(model, CONFIG):
            return (model(X) ** 2).mean()

    grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads["up"]))


def trained(seed: int, aware: bool) -> float:
    """The loss, after quantization, of a net that learned another one's outputs."""
    teacher, model = Net(nnx.Rngs(100)), Net(nnx.Rngs(seed))
    y = 3 * teacher(X)
    rate = optax.cosine_decay_schedule(3e-3, 400)
    optimizer = nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param)
    cfg = qjax.QuantConfig(format="int4", block_size=64, compute_dtype=jnp.float32)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            if not aware:
                return ((model(X) - y) ** 2).mean()
            with qjax.fake_quantized(model, cfg):
                return ((model(X) - y) ** 2).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    for _ in range(400):
        step(model, optimizer)
    return float(((qjax.quantize_model(model, cfg)(X) - y) ** 2).mean())


@pytest.mark.slow
def test_training_with_rounding_beats_rounding_after_training():
    pairs = [(trained(seed, True), trained(seed, False)) for seed in range(3)]
    assert all(aware < 0.8 * after for aware, after in pairs), pairs


def test_linen_parameters():
    net = nn.Sequential([nn.Dense(64), nn.gelu, nn.Dense(8)])
    params = net.init(jax.random.key(0), X)["params"]

    def loss(params):
        return (net.apply({"params": qjax.fake_quantize_params(params, CONFIG)}, X) ** 2).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    decoded = qjax.dequantize_model(qjax.quantize_params(params, CONFIG))
    # The same float32 sums, in another order.
    np.testing.assert_allclose(value, (net.apply({"params": decoded}, X) ** 2).mean(), rtol=1e-5)
    want = jax.grad(lambda p: (net.apply({"params": p}, X) ** 2).mean())(decoded)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_linen_adapters():
    net = nn.Sequential([nn.Dense(64), nn.gelu, nn.Dense(8)])
    params = net.init(jax.random.key(0), X)["params"]
    lora = qjax.add_lora_params(
        qjax.quantize_params(params, CONFIG), qjax.LoraConfig(rank=4), jax.random.key(1)
    )
    trainable, frozen = qjax.partition(lora)
    trainable = jax.tree.map(lambda a: a + 0.1, trainable)  # B is zero at first

    def merged(trainable):
        return qjax.merge_lora(qjax.combine(trainable, frozen), jnp.float32, source=params)

    def loss(trainable):
        rounded = qjax.fake_quantize_params(merged(trainable), CONFIG)
        return (net.apply({"params": rounded}, X) ** 2).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(trainable)
    w, box = params["layers_0"]["kernel"], trainable["layers_0"]["kernel"]
    a, b = np.asarray(box.lora_a, np.float64), np.asarray(box.lora_b, np.float64)
    want = np.asarray(w, np.float64) + lora["layers_0"]["kernel"].scaling * (a @ b)
    # Sums of 4 products in float32.
    np.testing.assert_allclose(merged(trainable)["layers_0"]["kernel"], want, rtol=1e-5, atol=1e-6)
    quantized = qjax.quantize_params(merged(trainable), CONFIG)
    after = net.apply({"params": qjax.dequantize_model(quantized)}, X)
    np.testing.assert_allclose(value, (after**2).mean(), rtol=1e-5)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    with pytest.raises(ValueError, match="source has no float kernel layers_0/kernel"):
        qjax.merge_lora(lora, source={})
    with pytest.raises(ValueError, match=r"layers_0/kernel must be \[64, 64\], got \[2, 2\]"):
        qjax.merge_lora(lora, source=lambda path: jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="source is for merging parameters of Linen"):
        qjax.merge_lora(lora, requantize=True, source=params)


def test_misuse():
    model = qjax.quantize_model(Net(nnx.Rngs(0)))
    rounding = qjax.fake_quantized(model, CONFIG)
    with pytest.raises(ValueError, match="no dense layer in floating point to round"), rounding:
        pass
