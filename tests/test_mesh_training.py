"""LoRA training on meshes of 8 devices: losses of one device, collectives of the float model."""

import flax.linen as nn
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

IN, HIDDEN, ROWS = 256, 512, 1024
# Blocks of 32, so that 256 / 8 weights of a row are whole blocks; float32 products, to compare.
CFG = qjax.QuantConfig(block_size=32, compute_dtype=jnp.float32)
LORA = qjax.LoraConfig(rank=4)
# How the kernels [in, hidden] and [hidden, in] are sharded, and x.
LAYOUTS = {
    "data": ((8,), ("d",), (None, None), P("d")),
    "fsdp": ((8,), ("d",), ("d", None), P("d")),
    "tensor": ((8,), ("t",), (None, "t"), P()),
    "both": ((2, 4), ("d", "t"), ("d", "t"), P("d")),
}


class MLP(nnx.Module):
    def __init__(self, spec, rngs):
        init = nnx.initializers.lecun_normal()
        up, down = (nnx.with_partitioning(init, s) for s in (spec, spec[::-1]))
        self.up = nnx.Linear(IN, HIDDEN, rngs=rngs, kernel_init=up)
        self.down = nnx.Linear(HIDDEN, IN, rngs=rngs, kernel_init=down)

    def __call__(self, x, out_sharding=None):
        return self.down(nnx.gelu(self.up(x)), out_sharding=out_sharding)


class LinenMLP(nn.Module):
    spec: tuple

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        up, down = (nn.with_partitioning(init, s) for s in (self.spec, self.spec[::-1]))
        x = nn.gelu(nn.Dense(HIDDEN, kernel_init=up)(x))
        return nn.Dense(IN, kernel_init=down)(x)


def data():
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, ROWS, IN), np.float32)


def make_model(spec):
    model = qjax.quantize_model(MLP(spec, nnx.Rngs(0)), CFG)
    return qjax.add_lora(model, LORA, rngs=nnx.Rngs(1))


def model_on(mesh, spec):
    with jax.set_mesh(mesh):
        return make_model(spec)


def train(model, mesh, x_spec, steps=3):
    """Return losses, the compiled step and the optimizer."""
    explicit = mesh.axis_types[0] == AxisType.Explicit
    out = x_spec if explicit else None
    with jax.set_mesh(mesh):
        x, target = (jax.device_put(a, NamedSharding(mesh, x_spec)) for a in data())
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
        graph, *states = nnx.split((model, optimizer), nnx.LoRAParam, nnx.OptState, ...)

        @jax.jit
        def step(x, target, *states):
            model, optimizer = nnx.merge(graph, *states)

            def loss_fn(model):
                return jnp.mean((model(x, out) - target) ** 2)

            wrt = nnx.DiffState(0, nnx.LoRAParam)
            loss, grads = nnx.value_and_grad(loss_fn, argnums=wrt)(model)
            optimizer.update(model, grads)
            return loss, nnx.split((model, optimizer), nnx.LoRAParam, nnx.OptState, ...)[1:]

        compiled = step.lower(x, target, *states).compile()
        losses = []
        for _ in range(steps):
            loss, states = compiled(x, target, *states)
            losses.append(float(loss))
        return losses, compiled, nnx.merge(graph, *states)[1]


@pytest.fixture(scope="module")
def one_device():
    """The losses of the model on a mesh of one device."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    return train(model_on(mesh, (None, None)), mesh, P())[0]


slow = pytest.mark.slow


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=() if n == "both" else slow) for n in LAYOUTS]
)
def test_losses_collectives_and_optimizer_state(layout, axis_type, one_device):
    shape, axes, spec, x_spec = LAYOUTS[layout]
    mesh = jax.make_mesh(shape, axes, axis_types=(axis_type,) * len(axes))
    model = model_on(mesh, spec)
    specs = model.up.kernel.q.packed.sharding.spec, model.down.kernel.q.scales.codes.sharding.spec
    assert [tuple(s) + (None,) * (2 - len(s)) for s in specs] == [spec[::-1], spec]
    losses, compiled, optimizer = train(model, mesh, x_spec)
    # float32 sums in another order, through three steps of Adam: 1e-5 of each loss.
    np.testing.assert_allclose(losses, one_device, rtol=1e-5)
    assert losses[-1] < losses[0]
    for moments in (optimizer.opt_state[0].mu, optimizer.opt_state[0].nu):
        for layer in ("up", "down"):
            for name in ("lora_a", "lora_b"):
                adapter = getattr(getattr(model, layer), name)[...]
                state = moments[layer][name][...]
                assert state.sharding.is_equivalent_to(adapter.sharding, 2), (layer, name)

    # The float model in question: decoded weights, the same adapters, automatic axes.
    auto = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))
    floated = qjax.dequantize_model(model_on(auto, spec))
    _, float_compiled, _ = train(floated, auto, x_spec, steps=0)
    ours, floats = collectives(compiled), collectives(float_compiled)
    assert set(ours) <= set(floats) and all(ours[kind] <= floats[kind] for kind in ours), (
        ours,
        floats,
    )
