"""One process of a cluster, or all of it: trains, saves every second step, goes on from a save.

python -m tests.multi_process FOLDER STEPS [ADDRESS PROCESS COUNT]

Prints "step loss" lines. Without an address it is one process, on all the devices that it has.
"""

import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax

IN, HIDDEN, ROWS = 256, 512, 1024


class MLP(nnx.Module):
    def __init__(self, rngs):
        init = nnx.initializers.lecun_normal()
        up, down = (nnx.with_partitioning(init, spec) for spec in (("d", "t"), ("t", "d")))
        self.up = nnx.Linear(IN, HIDDEN, kernel_init=up, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, IN, kernel_init=down, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


def make():
    cfg = qjax.QuantConfig(block_size=32, compute_dtype=jnp.float32)
    model = qjax.quantize_model(MLP(nnx.Rngs(0)), cfg)
    model = qjax.add_lora(model, qjax.LoraConfig(rank=4), rngs=nnx.Rngs(1))
    return model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.LoRAParam)


@nnx.jit
def train_step(model, optimizer, x):
    def loss_fn(model):
        return jnp.mean((model(x) - 1) ** 2)

    loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)
    return loss


def batch(step: int, sharding) -> jax.Array:
    """The whole batch of a step; each process makes the rows that its devices hold."""
    rows = np.random.default_rng(step).standard_normal((ROWS, IN), np.float32)
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])


def last_save(folder) -> int:
    """The step of the last complete checkpoint, 0 if there is none."""
    names = (path.name for path in pathlib.Path(folder).iterdir())
    return max((int(name) for name in names if name.isdigit()), default=0)


def main(folder: str, steps: str, *cluster: str) -> None:
    if cluster:
        address, process, count = cluster
        jax.distributed.initialize(address, int(count), int(process))
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        model, optimizer = make()
        start = last_save(folder)
        if start:
            like = {"model": model, "optimizer": optimizer}
            model, optimizer = qjax.load(pathlib.Path(folder) / str(start), like=like).values()
        for step in range(start, int(steps)):
            loss = train_step(model, optimizer, batch(step, NamedSharding(mesh, P("d"))))
            print(step, float(loss), flush=True)
            if step % 2 == 1:
                state = {"model": model, "optimizer": optimizer}
                qjax.save(pathlib.Path(folder) / str(step + 1), state)
    print("done", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(*sys.argv[1:])
