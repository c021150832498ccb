"""Expert weights [E, in, out] sharded over experts: LoRA training and checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from tests.hlo import collectives

E, IN, HIDDEN, ROWS = 8, 128, 256, 32
CFG = qjax.QuantConfig(compute_dtype=jnp.float32)  # float32 products, to compare


class Experts(nnx.Module):
    """Weights as mixtures of experts often have them: raw parameters, routed outside."""

    def __init__(self, rngs):
        def weight(fan_in, fan_out):
            value = rngs.params.normal((E, fan_in, fan_out)) * fan_in**-0.5
            return nnx.Param(value, out_sharding=("e", None, None))

        self.up, self.down = weight(IN, HIDDEN), weight(HIDDEN, IN)

    def __call__(self, x):
        hidden = nnx.gelu(jnp.einsum("end,edf->enf", x, self.up[...]))
        return jnp.einsum("enf,efd->end", hidden, self.down[...])


def call(module, up, x):
    hidden = nnx.gelu(up.einsum("end,edf->enf", x))
    return up.beside("down").einsum("enf,efd->end", hidden)


qjax.register(Experts, "up", equation="end,edf->enf", calls={"__call__": call})
qjax.register(Experts, "down", equation="enf,efd->end")


def mesh_of(count, axis_type=AxisType.Auto):
    return jax.sharding.Mesh(np.array(jax.devices()[:count]), ("e",), axis_types=(axis_type,))


def make(mesh):
    with jax.set_mesh(mesh):
        model = qjax.quantize_model(Experts(nnx.Rngs(0)), CFG)
        return qjax.add_lora(model, qjax.LoraConfig(rank=4), rngs=nnx.Rngs(1))


def train(model, mesh, steps=3):
    """Return losses and the compiled step."""
    x, target = np.random.default_rng(0).standard_normal((2, E, ROWS, IN), np.float32)
    with jax.set_mesh(mesh):
        x, target = jax.device_put((x, target), NamedSharding(mesh, P("e")))
        tx = optax.adam(1e-2)
        graph, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
        state = jax.device_put(tx.init(adapters), None)

        @jax.jit
        def step(adapters, state, rest):
            def loss_fn(adapters):
                return jnp.mean((nnx.merge(graph, adapters, rest)(x) - target) ** 2)

            loss, grads = jax.value_and_grad(loss_fn)(adapters)
            updates, state = tx.update(grads, state, adapters)
            return optax.apply_updates(adapters, updates), state, loss

        compiled = step.lower(adapters, state, rest).compile()
        losses = []
        for _ in range(steps):
            adapters, state, loss = compiled(adapters, state, rest)
            losses.append(float(loss))
        nnx.update(model, adapters)
    return losses, compiled


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_training_sends_nothing_and_checkpoints_move_to_another_mesh(axis_type, tmp_path):
    mesh = mesh_of(8, axis_type)
    model = make(mesh)
    arrays = (
        model.up.q.packed,
        model.up.q.scales.absmax,
        model.up_lora_a[...],
        model.down_lora_b[...],
    )
    assert all(a.sharding.spec[0] == "e" for a in arrays)
    losses, compiled = train(model, mesh)
    # float32 sums in another order, through three steps of Adam: 1e-5 of each loss.
    np.testing.assert_allclose(losses, train(make(mesh_of(1)), mesh_of(1))[0], rtol=1e-5)
    assert losses[-1] < losses[0]
    assert collectives(compiled) == {"all-reduce": 4}  # the loss

    qjax.save(tmp_path / "eight", model)
    for count in (2, 8):
        loaded = qjax.load(tmp_path / "eight", like=make(mesh_of(count)))
        assert loaded.up.q.packed.sharding == NamedSharding(mesh_of(count), P("e", None, None))
        jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(model))
