"""AdamW in 8 bits: bitsandbytes' tables, the update in float64, state bytes, and convergence."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qjax
import qjax.nnx
from qjax.core.double_quant import dynamic_table

# SHA-256 of the float32 bytes of bitsandbytes 0.50.2's create_dynamic_map(signed=...).
SIGNED = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
TABLES = {signed: np.asarray(dynamic_table(signed), np.float64) for signed in (True, False)}


def test_the_tables_are_those_of_bitsandbytes():
    assert hashlib.sha256(dynamic_table(True).tobytes()).hexdigest() == SIGNED
    table = dynamic_table(False)
    assert len(set(table)) == 256 and table[0] == 0 and table[-1] == 1
    # By hand from create_dynamic_map: the first decade has two values, 0.325e-6 and 0.775e-6; the
    # last 128, from 0.1 + 0.9 / 256 in steps of 0.9 / 128.
    np.testing.assert_allclose(table[1:3], [0.325e-6, 0.775e-6], rtol=1e-6)
    last = 0.1 + 0.9 / 256 + 0.9 / 128 * np.arange(128)
    np.testing.assert_allclose(table[-129:-1], last, rtol=1e-6)


def rounded(x, signed):
    """The nearest table entry, in blocks of 256, in float64."""
    blocks = np.pad(x.reshape(-1), (0, -x.size % 256)).reshape(-1, 256)
    absmax = np.abs(blocks).max(-1, keepdims=True)
    scaled = blocks / np.where(absmax > 0, absmax, 1)
    table = TABLES[signed]
    nearest = np.abs(scaled[..., None] - table).argmin(-1)
    return (table[nearest] * absmax).reshape(-1)[: x.size].reshape(x.shape)


def test_updates_are_adam_of_the_rounded_moments(rng):
    grads = rng.normal(size=(5, 20, 30)) * 10.0 ** rng.integers(-3, 2, size=(5, 20, 1))
    params = jnp.asarray(rng.normal(size=(20, 30)), jnp.float32)
    tx = qjax.adamw8bit(0.1, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.01, min_size=0)
    state, update = tx.init(params), jax.jit(tx.update)
    m = v = np.zeros((20, 30))
    for t, g in enumerate(grads, 1):
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-6)
        want = -0.1 * (step + 0.01 * np.asarray(params, np.float64))
        got, state = update(jnp.asarray(g, jnp.float32), state, params)
        # float32; a value that lies on the border of two codes may fall to either, one in a
        # thousand or so, which moves it by the step of the table (at most 5 % of it).
        close = np.isclose(got, want, rtol=1e-4, atol=1e-6)
        assert close.mean() > 0.99
        np.testing.assert_allclose(got, want, rtol=0.1, atol=1e-3)
        m, v = rounded(m, True), rounded(v, False)


def test_first_steps_equal_optax_and_small_leaves_always_do(rng):
    params = {"w": jnp.asarray(rng.normal(size=(64, 65)), jnp.float32), "b": jnp.ones(65)}
    ours, theirs = qjax.adamw8bit(1e-2), optax.adamw(1e-2)
    state, reference = ours.init(params), theirs.init(params)
    for i in range(4):
        grads = jax.tree.map(lambda p, i=i: jnp.cos(p * 7 + i), params)
        one, state = ours.update(grads, state, params)
        other, reference = theirs.update(grads, reference, params)
        # The same float32 formula, in another order.
        np.testing.assert_allclose(one["b"], other["b"], rtol=1e-4, atol=1e-8)
        if i == 0:  # nothing is rounded yet
            np.testing.assert_allclose(one["w"], other["w"], rtol=1e-4, atol=1e-8)


def test_the_state_takes_two_bytes_a_parameter():
    params = {"w": jnp.zeros((256, 256), jnp.bfloat16), "none": None}
    state = jax.tree.leaves(qjax.adamw8bit(1e-3).init(params)[0])
    assert sum(leaf.nbytes for leaf in state) == 256 * 256 * 2 + 2 * 256 * 4 + 4
    updates, _ = qjax.adamw8bit(1e-3).update(params, qjax.adamw8bit(1e-3).init(params), params)
    assert updates["w"].dtype == jnp.bfloat16


def test_adapters_converge_as_with_float32_adamw():
    """The last loss of a regression by rank-16 adapters on a 4-bit layer, over three seeds."""
    x = jax.random.normal(jax.random.key(1), (64, 512))
    y = x @ (0.1 * jax.random.normal(jax.random.key(2), (512, 64)))

    def train(tx, seed):
        layer = qjax.nnx.QuantLinear(512, 64, lora=qjax.LoraConfig(rank=16), rngs=nnx.Rngs(seed))
        optimizer = nnx.Optimizer(layer, tx, wrt=nnx.LoRAParam)

        @nnx.jit
        def step(layer, optimizer):
            loss, grads = nnx.value_and_grad(
                lambda layer: jnp.mean((layer(x) - y) ** 2),
                argnums=nnx.DiffState(0, nnx.LoRAParam),
            )(layer)
            optimizer.update(layer, grads)
            return loss

        return [float(step(layer, optimizer)) for _ in range(60)]

    ours = np.mean([train(qjax.adamw8bit(3e-3, min_size=0), s)[-1] for s in range(3)])
    theirs = np.mean([train(optax.adamw(3e-3), s)[-1] for s in range(3)])
    start = train(optax.adamw(3e-3), 0)[0]
    assert theirs < 0.5 * start  # it learns
    # The noise: losses of different seeds lie within 10 % of each other at the end.
    assert ours < 1.1 * theirs


@pytest.mark.parametrize(
    "options, message",
    [
        ({"b1": 1.0}, "b1=1.0 must be"),
        ({"b2": -1}, "b2=-1 must"),
        ({"min_size": -1}, "min_size=-1"),
    ],
)
def test_misuse_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        qjax.adamw8bit(1e-3, **options)


def kinds(state) -> set[tuple[bool, str]]:
    """Of the arrays of a state: whether it is a scalar, and where it is."""
    return {(a.ndim == 0, a.sharding.memory_kind) for a in jax.tree.leaves(state)}


@pytest.mark.parametrize("make", [qjax.adamw8bit, optax.adamw])
def test_state_on_the_host_gives_the_same_updates(make, rng):
    params = {"w": jnp.asarray(rng.normal(size=(80, 64)), jnp.float32), "b": jnp.ones(3)}
    plain, offloaded = make(0.1), qjax.offload_state(make(0.1))
    states = plain.init(params), offloaded.init(params)
    step, offloaded_step = jax.jit(plain.update), jax.jit(offloaded.update)
    for _ in range(3):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        want, state = step(grads, states[0], params)
        got, moved = offloaded_step(grads, states[1], params)
        jax.tree.map(np.testing.assert_array_equal, got, want)
        assert kinds(moved) == {(True, "device"), (False, "pinned_host")}
        assert kinds(got) == {(False, "device")}
        states = state, moved


def test_an_nnx_optimizer_keeps_its_state_on_the_host(tmp_path):
    layer = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(layer, qjax.offload_state(qjax.adamw8bit(1e-2)), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer):
        loss, grads = nnx.value_and_grad(lambda layer: jnp.mean(layer(jnp.ones((2, 64))) ** 2))(
            layer
        )
        optimizer.update(layer, grads)
        return loss

    first, second = step(layer, optimizer), step(layer, optimizer)
    assert second < first
    assert kinds(nnx.state(optimizer)) == {(True, "device"), (False, "pinned_host")}
    assert kinds(nnx.state(layer)) == {(False, "device")}
    qjax.save(tmp_path / "state", nnx.state(optimizer))
    loaded = qjax.load(tmp_path / "state", like=nnx.state(optimizer))
    assert kinds(loaded) == kinds(nnx.state(optimizer))
    jax.tree.map(np.testing.assert_array_equal, loaded, nnx.state(optimizer))
