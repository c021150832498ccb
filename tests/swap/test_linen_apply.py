"""Unmodified Linen models on 4-bit kernels: plain, with the fused ops, scanned, with dropout."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors

import qjax
from qjax.ops import trace
from qjax.swap.linen import dequantize_params
from tests.swap.linen_models import Loop, Scanned, make, max_error

# float32 products of the same decoded weights in another order: up to 128 terms in each of some ten
# layers in a row, each adding a few eps of what passes through it.
TOLERANCE = 1e-5
EVERYTHING = qjax.QuantConfig(
    block_size=32, double_quant=False, compute_dtype=jnp.float32, include="kernel|embedding"
)


@pytest.fixture(scope="module", params=[Loop, Scanned])
def quantized(request):
    """A model, its 4-bit parameters, a batch, and the logits of the decoded parameters."""
    model, params, ids = make(request.param, use_bias=request.param is Loop, dropout=0.5)
    qparams = qjax.quantize_params(params, EVERYTHING)
    decoded = dequantize_params(qparams)
    return model, qparams, ids, jax.jit(model.apply)({"params": decoded}, ids)


def test_plain_and_fused_agree_with_decoded_weights(quantized):
    model, qparams, ids, expected = quantized
    plain = jax.jit(model.apply)({"params": qparams}, ids)
    fused = jax.jit(lambda p: qjax.apply(model, {"params": p}, ids))(qparams)
    assert max_error(plain, expected) < TOLERANCE
    assert max_error(fused, expected) < TOLERANCE


def test_every_kernel_runs_on_a_fused_op(quantized):
    model, qparams, ids, _ = quantized

    def uses(fn):
        with trace.recording() as records:
            jax.eval_shape(lambda p: fn({"params": p}, ids), qparams)
        return {(record.path, record.op) for record in records}

    fused = uses(lambda *args: qjax.apply(model, *args))
    blocks = ["layers"] if isinstance(model, Scanned) else ["layer_0", "layer_1"]
    expected = {
        (f"{block}/{name}/kernel", "matmul")
        for block in blocks
        for name in ("gate", "up", "down", *(f"attn/{n}" for n in ("query", "key", "value", "out")))
    }
    expected.add(("embed/embedding", "take"))
    expected.add(
        ("embed/embedding", "einsum")
        if isinstance(model, Scanned)
        else ("lm_head/kernel", "matmul")
    )
    assert fused == expected
    with qjax.fused():
        assert uses(model.apply) == fused
    assert uses(model.apply) == set()


def test_gradients_of_the_input_agree(quantized):
    """Through scan, remat and the custom backward pass: with respect to a float leaf, a norm."""
    model, qparams, ids, _ = quantized

    def loss(scale, params, run):
        params = {**params, "norm": {"scale": scale}}
        return (run({"params": params}, ids) ** 2).mean()

    scale = qparams["norm"]["scale"]
    fused = jax.jit(jax.grad(lambda s, p: loss(s, p, lambda *a: qjax.apply(model, *a))))
    plain = jax.jit(jax.grad(lambda s, p: loss(s, p, model.apply)))
    expected = plain(scale, dequantize_params(qparams))
    assert max_error(fused(scale, qparams), expected) < TOLERANCE


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.gelu(nn.Dense(64)(x))
        return nn.Dense(8)(nn.Dropout(0.5, deterministic=deterministic)(x))


def test_adapter_dropout():
    """Dropout needs an rng, as nn.Dropout does, and deterministic=True turns it off."""
    model, x = Mlp(), jnp.ones((4, 64))
    qparams = qjax.quantize_params(model.init(key(), x)["params"], EVERYTHING)
    adapted = qjax.add_lora_params(qparams, qjax.LoraConfig(4, dropout=0.5), key())
    variables = {"params": with_b(adapted)}
    rngs = {"dropout": jax.random.key(1)}
    evaluated = qjax.apply(model, variables, x)
    on = qjax.apply(model, variables, x, rngs=rngs, deterministic=True)
    np.testing.assert_array_equal(on, evaluated)
    # `deterministic` is the model's own argument too; its default leaves nn.Dropout off.
    dropped = qjax.apply(model, variables, x, rngs=rngs)
    assert max_error(dropped, evaluated) > 0.01
    assert max_error(qjax.apply(model, variables, x, rngs={"dropout": key()}), dropped) > 0.01
    with qjax.fused():  # a trainer's own call
        np.testing.assert_array_equal(model.apply(variables, x, rngs=rngs), dropped)
    with pytest.raises(errors.InvalidRngError, match="dropout"):
        qjax.apply(model, variables, x, deterministic=False)
    with pytest.raises(ValueError, match=r"dropout=0\.5 cannot be part of a decoded kernel"):
        model.apply(variables, x)


def with_b(params):
    """Fill the B of each adapter, which starts as zeros, so that it does something."""

    def fill(path, leaf):
        if getattr(path[-1], "name", None) != "lora_b":
            return leaf
        return jnp.asarray(np.random.default_rng(1).normal(size=leaf.shape) / 8, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, params)


def key():
    return jax.random.key(0)


def test_layers_of_a_scan_drop_differently():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x, nn.Dense(8, use_bias=False, name="up")(x)

    model = nn.scan(
        Layer, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=2
    )()
    x = jnp.ones((4, 64))
    w = jnp.broadcast_to(jnp.ones((64, 8)), (2, 64, 8))
    qparams = qjax.quantize_params({"up": {"kernel": w}}, EVERYTHING, batch_ndim=1)
    params = qjax.add_lora_params(qparams, qjax.LoraConfig(4, dropout=0.5), key())
    params = jax.tree.map(lambda x: x * 0 + 1 if x.dtype == jnp.float32 else x, params)
    rngs = {"dropout": key()}
    _, ys = qjax.apply(model, {"params": params}, x, rngs=rngs)
    assert not np.allclose(ys[0], ys[1])
    # A scan that does not hand the rng on would train without dropout: Flax says so instead.
    silent = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
    with pytest.raises(errors.InvalidRngError, match="dropout"):
        qjax.apply(silent, {"params": params}, x, rngs=rngs)


def test_arguments_of_module_apply_pass_through():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return self.other(x, 1.0)

        @nn.compact
        def other(self, x, add, *, times=1.0):
            self.sow("intermediates", "h", x)
            return nn.Dense(8, name="up")(x) * times + add

    params = {"params": {"up": {"kernel": jnp.ones((64, 8)), "bias": jnp.ones(8)}}}
    params = qjax.quantize_params(params, EVERYTHING)
    x = jnp.ones((1, 64))
    y, state = qjax.apply(
        Model(), params, x, 2.0, times=3.0, method=Model.other, mutable=["intermediates"]
    )
    # 64 ones, which NF4 holds exactly: its largest code is one times the block's scale.
    np.testing.assert_array_equal(y, np.full((1, 8), 65 * 3.0 + 2, np.float32))
    assert state["intermediates"]["h"][0] is x


def test_a_layer_with_its_own_product_is_decoded_with_a_warning():
    calls = []

    def dot_general(*args, **kwargs):
        calls.append(args[1])
        return jax.lax.dot_general(*args, **kwargs)

    model = nn.Dense(8, dot_general=dot_general, name="own_product")
    params = {"params": qjax.quantize_params({"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)})}
    with pytest.warns(UserWarning, match="kernel is decoded .*dot_general of its own"):
        y = qjax.apply(model, params, jnp.ones((1, 64)))
    np.testing.assert_array_equal(y, np.full((1, 8), 64, np.float32))
    assert len(calls) == 1


def test_an_unknown_module_gets_the_decoded_kernel():
    class Foreign(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.tanh(x @ self.param("w", nn.initializers.ones, (64, 8)))

    params = qjax.quantize_params({"w": jnp.ones((64, 8))}, contract_axes={"w": (0,)})
    y = qjax.apply(Foreign(), {"params": params}, jnp.full((1, 64), 1 / 64))
    np.testing.assert_array_equal(y, np.tanh(np.ones((1, 8), np.float32)))


def test_fused_ends_with_its_block():
    model, x = nn.Dense(8), jnp.ones((1, 64))
    params = qjax.quantize_params(model.init(key(), x), EVERYTHING)
    with trace.recording() as records:
        with qjax.fused():
            model.apply(params, x)
        assert len(records) == 1
        model.apply(params, x)
    assert len(records) == 1
