"""Linen models of other libraries: equations at call time, shared scopes, raw parameters."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax
from qjax.nn.linen_box import QuantBox
from tests.swap.linen_foreign_models import DIM, HIDDEN, VOCAB, Einsum, Experts, Model

F32 = qjax.QuantConfig(block_size=32, compute_dtype=jnp.float32)
IDS = np.arange(6).reshape(2, 3)
AXES = {  # contracted axes, and the number of batch axes
    "attn/q_einsum/w": ((1,), 0),
    "attn/kv_einsum/w": ((2,), 0),
    "attn/attn_vec_einsum/w": ((0, 1), 0),
    "mlp/gating_einsum": ((2,), 0),
    "mlp/linear": ((0,), 0),
    "moe/up": ((0,), 1),
    "moe/down": ((0,), 1),
}
RAW = {"moe/up", "moe/down"}
WARNING = r"are a guess, .* decodes the whole weight at each use: .*{0}moe/down, {0}moe/up; see"
# float32 sums in another order, of numbers around 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def boxes(params):
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=nn.meta.is_axis_metadata)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
        if isinstance(leaf, QuantBox)
    }


@functools.cache
def floats(scan_axis=None):
    return jax.jit(Model(scan_axis).init)(jax.random.key(0), IDS)["params"]


def plain(module, params):
    return jax.jit(module.apply)({"params": params}, IDS)


def fused(module, params):
    return jax.jit(functools.partial(qjax.apply, module))({"params": params}, IDS)


def make(scan_axis=None, cfg=F32):
    """The module, and its parameters in 4 bits."""
    module, params = Model(scan_axis), floats(scan_axis)
    prefix = "layer/" if scan_axis is None else "layers/"
    with pytest.warns(UserWarning, match=WARNING.format(prefix)):
        return module, qjax.quantize_params(params, cfg, module=module, example_args=(IDS,))


@pytest.mark.parametrize("scan_axis", [None, pytest.param(0, marks=pytest.mark.slow), 1])
def test_whole_model(scan_axis):
    module, params = make(scan_axis)
    prefix, stacked = ("layer/", 0) if scan_axis is None else ("layers/", 1)
    found = boxes(params)
    assert {
        path.removeprefix(prefix): (box.q.contract_axes, len(box.q.batch_shape) - stacked)
        for path, box in found.items()
    } == AXES
    names = ("expert", None, "model")
    assert found[f"{prefix}moe/up"].names == (("layers", *names) if stacked else names)
    report = qjax.report(params, module, IDS)
    assert {row.path.removeprefix(prefix): row.uses for row in report.rows if row.is_quantized} == {
        path: ("decode: whole weight" if path in RAW else "einsum: xla",) for path in AXES
    }
    assert report["embedder/input_embedding"].note == "embeddings are kept by default"
    assert report.totals.nbytes == sum(array.nbytes for array in jax.tree.leaves(params))

    decoded = qjax.dequantize_model(params)
    assert jax.tree.structure(decoded) == jax.tree.structure(floats(scan_axis))
    want = plain(module, decoded)
    np.testing.assert_allclose(fused(module, params), want, **CLOSE)
    np.testing.assert_allclose(plain(module, params), want, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("scan_axis", [None, 1])
def test_twenty_steps_and_back(scan_axis, tmp_path):
    module, params = make(scan_axis)
    params = qjax.add_lora_params(params, qjax.LoraConfig(rank=4, alpha=8), jax.random.key(1))
    up = next(box for path, box in boxes(params).items() if path.endswith("moe/up"))
    stack = () if scan_axis is None else (2,)
    assert (up.lora_a.shape, up.lora_b.shape) == ((*stack, 4, DIM, 4), (*stack, 4, 4, HIDDEN))
    trainable, frozen = qjax.partition(params)
    tx = optax.adamw(1e-2)
    state = tx.init(trainable)

    @jax.jit
    def step(trainable, state):
        def loss_fn(trainable):
            params = qjax.combine(trainable, frozen)
            logits = qjax.apply(module, {"params": params}, IDS)
            return -jax.nn.log_softmax(logits)[..., 7].mean()

        loss, grads = jax.value_and_grad(loss_fn)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    losses = []
    for _ in range(20):
        trainable, state, loss = step(trainable, state)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(trainable))
    params = qjax.combine(trainable, frozen)
    trained = fused(module, params)
    # x (W + A B) against x W + (x A) B, after 20 steps of a large rate.
    merged = plain(module, qjax.merge_lora(params, jnp.float32))
    np.testing.assert_allclose(merged, trained, rtol=1e-3, atol=1e-3)
    qjax.save(tmp_path / "model", params)
    for like in (params, None):
        again = qjax.load(tmp_path / "model", like=like)
        np.testing.assert_array_equal(fused(module, again), trained)


def test_without_the_module_axes_are_guessed():
    module = Model()
    with pytest.warns(UserWarning, match="see qjax.register, and pass module= and example_args="):
        params = qjax.quantize_params(floats(), F32)
    assert {path.removeprefix("layer/") for path in boxes(params)} == set(AXES)
    want = plain(module, qjax.dequantize_model(params))
    with pytest.warns(UserWarning, match="gating_einsum is decoded for its product"):
        got = fused(module, params)
    np.testing.assert_allclose(got, want, **CLOSE)


def test_tables_if_asked():
    module, params = make(cfg=qjax.QuantConfig(include=".*", compute_dtype=jnp.float32))
    box = params["embedder"]["input_embedding"]
    assert (box.q.contract_axes, box.names) == ((1,), ("vocab", None))
    want = plain(module, qjax.dequantize_model(params))
    np.testing.assert_allclose(fused(module, params), want, **CLOSE)


class Scaled(Einsum):
    """Called with an equation, and more than that einsum."""

    @nn.compact
    def __call__(self, eqn, x):
        return 2 * jnp.einsum(eqn, x, self.param("w", nn.initializers.normal(), self.shape))


class Project(nn.Module):
    """Has its equation in the code."""

    @nn.compact
    def __call__(self, x, double=False):
        w = self.param("matrix", nn.initializers.normal(), (DIM, VOCAB))
        return (2 if double else 1) * (x @ w)


def test_what_is_not_one_einsum_is_decoded():
    module, x = Scaled((DIM, 40)), jnp.ones((2, DIM))
    params = module.init(jax.random.key(0), "bd,df->bf", x)["params"]
    with pytest.warns(UserWarning, match="decodes the whole weight at each use: w; see"):
        params = qjax.quantize_params(params, F32, module=module, example_args=("bd,df->bf", x))
    got = qjax.apply(module, {"params": params}, "bd,df->bf", x)
    want = 2 * x @ params["w"].q.dequantize()
    # Sums of 64 float32 products, in another order.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_registered(monkeypatch):
    monkeypatch.setattr("qjax.nn.registry._entries", {})

    def call(module, weight, x, double=False):
        return (2 if double else 1) * weight.einsum("...d,df->...f", x)

    qjax.register(Project, "matrix", calls={"__call__": call})
    module, x = Project(), jnp.ones((2, 3, DIM))
    params = module.init(jax.random.key(0), x)["params"]
    params = qjax.quantize_params(params, F32, module=module, example_args=(x,))
    assert qjax.report(params, module, x)["matrix"].uses == ("einsum: xla",)
    want = 2 * x @ params["matrix"].q.dequantize()
    got = qjax.apply(module, {"params": params}, x, double=True)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    # The adapter's input may drop out, because the product is known.
    cfg = qjax.LoraConfig(rank=4, dropout=0.5, include="matrix")
    params = qjax.add_lora_params(params, cfg, jax.random.key(1))
    b = jnp.ones_like(params["matrix"].lora_b)
    params = {"matrix": dataclasses.replace(params["matrix"], lora_b=b)}
    first, second = (
        qjax.apply(module, {"params": params}, x, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 1)
    )
    assert np.abs(first - second).max() > 0
    with pytest.raises(ValueError, match=r"dropout=0\.5 cannot be part of a decoded kernel"):
        module.apply({"params": params}, x)


def test_two_weights_in_one_method(monkeypatch):
    monkeypatch.setattr("qjax.nn.registry._entries", {})

    def run(module, up, x):
        hidden = jax.nn.silu(up.einsum("btd,edf->btef", x))
        down = up.beside("down").einsum("btef,efd->btd", hidden)
        return down + module.get_variable("params", "shift")

    qjax.register(Experts, "up", equation="btd,edf->btef", calls={"__call__": run})
    qjax.register(Experts, "down", equation="btef,efd->btd")
    module, x = Experts(), jax.random.normal(jax.random.key(1), (2, 3, DIM))
    params = module.init(jax.random.key(0), x)["params"]
    params = qjax.quantize_params(params, F32, module=module, example_args=(x,))
    report = qjax.report(params, module, x)
    assert {row.uses for row in report.rows if row.is_quantized} == {("einsum: xla",)}
    assert params["down"].q.contract_axes == (0, 1)  # the sum over experts is part of the product
    want = module.apply({"params": qjax.dequantize_model(params)}, x)
    np.testing.assert_allclose(qjax.apply(module, {"params": params}, x), want, **CLOSE)
    params = qjax.add_lora_params(params, qjax.LoraConfig(rank=4), jax.random.key(1))
    params = jax.tree.map(
        lambda box: (
            dataclasses.replace(box, lora_b=0.1 * jnp.ones_like(box.lora_b))
            if isinstance(box, QuantBox)
            else box
        ),
        params,
        is_leaf=lambda leaf: isinstance(leaf, QuantBox),
    )
    want = module.apply({"params": qjax.merge_lora(params, jnp.float32)}, x)
    np.testing.assert_allclose(
        qjax.apply(module, {"params": params}, x), want, rtol=1e-3, atol=1e-3
    )
