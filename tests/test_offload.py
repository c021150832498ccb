"""4-bit weights in host memory: where they are, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qjax
from tests.test_mesh_training import IN, LORA, LinenMLP


def kinds(tree) -> set[str]:
    return {a.sharding.memory_kind for a in jax.tree.leaves(tree)}


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((4, IN)), jnp.float32)


def make_layer():
    layer = qjax.quantize_model(nnx.Linear(IN, IN, rngs=nnx.Rngs(0)))
    return qjax.add_lora(layer, LORA, rngs=nnx.Rngs(1))


def test_nnx_training_is_the_same(x, tmp_path):
    def losses(layer):
        optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.LoRAParam)

        @nnx.jit
        def step(layer, optimizer):
            def loss_fn(layer):
                return jnp.mean((layer(x) - x) ** 2)

            wrt = nnx.DiffState(0, nnx.LoRAParam)
            loss, grads = nnx.value_and_grad(loss_fn, argnums=wrt)(layer)
            optimizer.update(layer, grads)
            return loss

        return [float(step(layer, optimizer)) for _ in range(3)]

    layer = qjax.offload(make_layer())
    assert losses(layer) == losses(make_layer())
    assert kinds(layer.kernel.q) == {"pinned_host"}  # after the steps too
    assert kinds(nnx.state(layer, nnx.LoRAParam)) == {"device"}
    qjax.save(tmp_path / "layer", layer)
    loaded = qjax.load(tmp_path / "layer", like=layer)
    assert kinds(loaded.kernel.q) == {"pinned_host"}
    np.testing.assert_array_equal(loaded.kernel[...], layer.kernel[...])


def test_linen_and_its_unfused_route(x):
    net = LinenMLP((None, None))
    params = qjax.quantize_params(net.init(jax.random.key(0), x)["params"])
    moved = qjax.offload(params)
    assert kinds(moved["Dense_0"]["kernel"]) == {"pinned_host"}
    assert kinds(moved["Dense_0"]["bias"]) == {"device"}
    for apply in (qjax.apply, lambda net, *args: net.apply(*args)):
        run = jax.jit(lambda params, apply=apply: apply(net, {"params": params}, x))
        np.testing.assert_array_equal(run(moved), run(params))


def test_a_scan_over_a_stack_and_a_lookup(x, rng):
    w = rng.standard_normal((3, IN, IN), np.float32)
    stack = qjax.quantize(jnp.asarray(w), batch_ndim=1)

    @jax.jit
    def grad(x, stack):
        def run(x):
            body = jax.checkpoint(lambda x, q: (jnp.tanh(qjax.matmul(x, q)), None))
            return jax.lax.scan(body, x, stack)[0].sum()

        return jax.grad(run)(x)

    np.testing.assert_array_equal(grad(x, qjax.offload(stack)), grad(x, stack))
    table = qjax.quantize(jnp.asarray(w[0]), contract_axes=(1,))
    take = jax.jit(qjax.take)
    ids = jnp.array([1, 5])
    np.testing.assert_array_equal(take(qjax.offload(table), ids), take(table, ids))


def test_nothing_to_move():
    for x in (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {"kernel": jnp.ones((2, 2))}):
        with pytest.raises(ValueError, match=r"nothing is in 4 bits"):
            qjax.offload(x)
