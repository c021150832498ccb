"""QLoRA steps of Llama shapes on one GPU, on two, and with the weights in host memory.

python benchmarks/two_gpus.py --out results.json [--layers 32] [--batch 8] [--length 2048]
python benchmarks/two_gpus.py --out results.json --offload [--layers 80]

Random NF4 weights with double quantization, stacked under `lax.scan` with remat, rank-16 float32
adapters, AdamW, bfloat16 activations. On two GPUs the weights are split by heads and features
("tensor") or along the axis that is summed over, with the batch ("fsdp"). Losses must agree: the
weights are the same random numbers on every mesh. `--offload` puts the 4-bit weights of the
Llama-2-70B shape in pinned host memory, from where each layer is fetched as it is used; the GPU's
memory is limited by XLA_PYTHON_CLIENT_MEM_FRACTION, so that they would not fit.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import pathlib
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.core.double_quant import DoubleQuant
from qjax.core.placement import adapter_specs, weight_specs
from qjax.ops.lora import lora_matmul

BLOCK, RANK, VOCAB = 64, 16, 32000
OVERLAP = {"xla_gpu_enable_latency_hiding_scheduler": True}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    dim: int = 4096
    hidden: int = 11008
    heads: int = 32
    kv_heads: int = 32
    layers: int = 32

    def weights(self) -> dict[str, tuple[int, int]]:
        """Name -> [in, out]."""
        kv = self.dim // self.heads * self.kv_heads
        square, fed = (self.dim, self.dim), (self.dim, self.hidden)
        return {"q": square, "k": (self.dim, kv), "v": (self.dim, kv), "o": square} | {
            "gate": fed,
            "up": fed,
            "down": fed[::-1],
        }


TINY = Shape(dim=256, hidden=512, heads=4, kv_heads=2, layers=2)
LLAMA_70B = Shape(8192, 28672, 64, 8, 80)
# Of each weight [layers, in, out]: what tensor parallelism and FSDP split over the mesh axis "m".
SPECS = {
    "tensor": lambda name: P(None, "m", None) if name in ("o", "down") else P(None, None, "m"),
    "fsdp": lambda name: P(None, "m", None),
    "one": lambda name: P(),
}


def random_weight(k: int, n: int, key: jax.Array) -> qjax.QTensor:
    """A random slice [k, n] with double quantization."""
    packed_key, scale_key = jax.random.split(key)
    packed = jax.random.bits(packed_key, (n, k // 2), jnp.uint8)
    codes = jax.random.bits(scale_key, (n, k // BLOCK), jnp.uint8)
    absmax = jnp.full((-(-n * k // BLOCK // 256),), 0.5 * k**-0.5, jnp.float32)
    scales = DoubleQuant(codes, absmax, jnp.float32(k**-0.5))
    return qjax.QTensor(packed, scales, (k, n), jnp.dtype(jnp.bfloat16), "nf4", BLOCK, (0,), "rows")


@functools.cache
def maker(function, *args):
    """A jitted `function(*args, key)`."""
    return jax.jit(functools.partial(function, *args))


def random_stack(k: int, n: int, keys: jax.Array) -> qjax.QTensor:
    return jax.lax.map(functools.partial(random_weight, k, n), keys)


def random_table(rows: int, columns: int, key: jax.Array) -> jax.Array:
    return 0.02 * jax.random.normal(key, (rows, columns), jnp.bfloat16)


def random_a(layers: int, k: int, key: jax.Array) -> jax.Array:
    return k**-0.5 * jax.random.normal(key, (layers, k, RANK))


def make_params(shape: Shape, device, memory_kind: str = "device"):
    """Frozen weights and adapters on one device; `memory_kind` is that of the 4-bit weights."""
    here = SingleDeviceSharding(device, memory_kind=memory_kind)
    frozen, adapters = {}, {}
    with jax.default_device(device):
        for i, (name, (k, n)) in enumerate(shape.weights().items()):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(0), i), shape.layers)
            made = maker(random_stack, k, n)(keys)
            frozen[name] = jax.block_until_ready(jax.device_put(made, here))
            del made
            a = maker(random_a, shape.layers, k)(keys[0])
            adapters[name] = a, jnp.zeros((shape.layers, RANK, n))
        for i, name in enumerate(("embed", "head")):
            frozen[name] = maker(random_table, VOCAB, shape.dim)(jax.random.key(i))
    return frozen, adapters


def placements(frozen, mesh: Mesh, how: str, memory_kind: str | None = None):
    """The shardings of `make_params`' trees on a mesh."""
    table_spec = {"tensor": P("m", None), "fsdp": P(None, "m"), "one": P()}[how]
    weights, adapters = {}, {}
    for name, leaf in frozen.items():
        specs = table_spec
        if isinstance(leaf, qjax.QTensor):
            specs = weight_specs(leaf, SPECS[how](name))
            pair = adapter_specs(SPECS[how](name), 3, 1, (0,))
            adapters[name] = tuple(NamedSharding(mesh, spec) for spec in pair)
        kind = memory_kind if isinstance(leaf, qjax.QTensor) else None
        weights[name] = jax.tree.map(
            lambda spec, kind=kind: NamedSharding(mesh, spec, memory_kind=kind),
            specs,
            is_leaf=lambda leaf: isinstance(leaf, P),
        )
    return weights, adapters


def norm(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-5)).astype(x.dtype)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary embeddings of [B, T, heads, head_dim]."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)


def hidden_states(adapters, frozen, ids, shape: Shape, attention: str, spread=lambda x: x):
    """The normed stream [B, T, dim]; `spread` says how the devices share it."""

    def layer(x, weights):
        x = spread(x)

        def linear(name, x):
            q, (a, b) = weights[name]
            return qjax.matmul(x, q) + (2 * lora_matmul(x, a, b)).astype(x.dtype)

        h = norm(x)
        head_dim = shape.dim // shape.heads
        q, k, v = (linear(n, h).reshape(*x.shape[:2], -1, head_dim) for n in "qkv")
        mixed = jax.nn.dot_product_attention(
            rotate(q), rotate(k), v, is_causal=True, implementation=attention
        )
        x = x + linear("o", mixed.reshape(x.shape))
        h = norm(x)
        return x + linear("down", jax.nn.silu(linear("gate", h)) * linear("up", h)), None

    x = frozen["embed"][ids]
    stacks = {name: (frozen[name], adapters[name]) for name in shape.weights()}
    return norm(jax.lax.scan(jax.checkpoint(layer), x, stacks)[0])


def loss_fn(adapters, frozen, ids, *how) -> jax.Array:
    x = hidden_states(adapters, frozen, ids, *how)
    logits = jnp.dot(x, frozen["head"].T, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()


def make_step(tx, *how):
    def step(adapters, state, frozen, ids):
        loss, grads = jax.value_and_grad(loss_fn)(adapters, frozen, ids, *how)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, loss

    return step


def log(**row) -> dict:
    print(json.dumps(row), flush=True)
    return row


class Training:
    """A step compiled for one mesh."""

    def __init__(self, how: str, devices, args, shape: Shape, made, kind=None, options=()):
        self.how, self.args, self.count, self.options = how, args, len(devices), dict(options)
        start = time.perf_counter()
        mesh = Mesh(np.array(devices), ("m",), axis_types=(AxisType.Auto,))
        shardings = placements(made[0], mesh, how, kind)
        self.frozen = jax.device_put(made[0], shardings[0])
        own = jax.tree.map(jnp.copy, made[1])  # they are donated
        self.adapters = jax.device_put(own, shardings[1])
        tx = optax.adamw(1e-4)
        everywhere = NamedSharding(mesh, P())
        self.state = jax.tree.map(
            lambda a: jax.device_put(a, a.sharding if a.ndim else everywhere),
            tx.init(self.adapters),
        )
        ids = jax.random.randint(jax.random.key(3), (args.batch, args.length), 0, VOCAB, jnp.int32)
        # FSDP splits the batch. Said of the activations too: from the weights alone the compiler
        # would split their features.
        rows = NamedSharding(mesh, P("m" if how == "fsdp" else None))
        self.ids = jax.device_put(ids, rows)
        placed = time.perf_counter()
        kept = jax.tree.map(lambda a: a.sharding, (self.adapters, self.state))
        spread = functools.partial(jax.lax.with_sharding_constraint, shardings=rows)
        step = jax.jit(
            make_step(tx, shape, args.attention, spread),
            donate_argnums=(0, 1),
            out_shardings=(*kept, everywhere),
        )
        lowered = step.lower(self.adapters, self.state, self.frozen, self.ids)
        self.compiled = lowered.compile(compiler_options=self.options)
        self.seconds = {"place_s": placed - start, "compile_s": time.perf_counter() - placed}

    def measure(self) -> dict:
        times, losses = [], []
        adapters, state, self.adapters, self.state = self.adapters, self.state, None, None
        for _ in range(2 + self.args.steps):
            start = time.perf_counter()
            adapters, state, loss = self.compiled(adapters, state, self.frozen, self.ids)
            losses.append(float(loss))
            times.append(time.perf_counter() - start)
        self.adapters = adapters
        step_time = sorted(times[2:])[self.args.steps // 2]
        text = self.compiled.as_text()
        kinds = r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
        return log(
            how=self.how,
            gpus=self.count,
            options=self.options,
            tokens_per_s=round(self.ids.size / step_time),
            step_ms=round(step_time * 1e3, 1),
            steps_ms=[round(t * 1e3, 1) for t in times],
            losses=[round(loss, 4) for loss in losses],
            device_gib=device_gib(self.compiled),
            calls=calls(self.compiled),
            collectives=collections.Counter(re.findall(kinds, text)),
            **{k: round(v, 1) for k, v in self.seconds.items()},
        )


def device_gib(compiled) -> float:
    """What a step takes of each device's memory: arguments and what it works with."""
    memory = compiled.memory_analysis()
    return round((memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30, 2)


def check_products(devices) -> list[dict]:
    """Products of few rows on both GPUs, automatic and explicit axes, against one GPU."""
    q = jax.jit(functools.partial(random_weight, 4096, 4096))(jax.random.key(4))

    def check(kind, spec, rows):
        mesh = Mesh(np.array(devices), ("m",), axis_types=(kind,))
        specs = weight_specs(q, spec)
        on = jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), q, specs)
        x = jax.random.normal(jax.random.key(5), (rows, 4096), jnp.bfloat16)
        expected = np.asarray(qjax.matmul(x, q), np.float32)
        with jax.set_mesh(mesh):
            x = jax.device_put(x, NamedSharding(mesh, P(None, spec[0])))
            compiled = jax.jit(qjax.matmul).lower(x, on).compile()
            y = np.asarray(compiled(x, on), np.float32)
        error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
        about = {"check": kind.name, "spec": str(spec), "rows": rows, "error": float(error)}
        return log(**about, calls=calls(compiled))

    kinds, specs = (AxisType.Auto, AxisType.Explicit), (P(None, "m"), P("m", None))
    rows = []
    for case in itertools.product(kinds, specs, (1, 512)):
        try:
            rows.append(check(*case))
        except Exception as error:  # the others still count
            rows.append(log(check=str(case), failed=repr(error)[:3000]))
    return rows


def calls(compiled) -> dict[str, int]:
    """How often the program calls each kernel or library."""
    found = re.findall(r'custom_call_target="([^"]+)"', compiled.as_text())
    return dict(collections.Counter(found))


def two_gpus(args, shape: Shape) -> list[dict]:
    devices, rows = jax.devices(), []
    start = time.perf_counter()
    made = make_params(shape, devices[0])
    log(make_s=round(time.perf_counter() - start, 1))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sets = [("one", devices[:1]), ("tensor", devices[:2]), ("fsdp", devices[:2])]
        cases = [(how, some, args, shape, made) for how, some in sets]
        compiling = [pool.submit(Training, *case) for case in cases]
        if devices[0].platform == "gpu":
            compiling += [pool.submit(Training, *case, options=OVERLAP) for case in cases[1:]]
        rows += check_products(devices[:2])
    while args.wait_for and not args.wait_for.exists():
        time.sleep(0.5)
    for training in compiling:  # all are compiled: nothing else runs now
        try:
            rows.append(training.result().measure())
        except Exception as error:  # the others still count
            rows.append(log(failed=repr(error)[:3000]))
    return rows


def offload(args, shape: Shape) -> list[dict]:
    device = jax.devices()[0]
    start = time.perf_counter()
    made = make_params(shape, device, "pinned_host")
    log(make_s=round(time.perf_counter() - start, 1))
    training = Training("one", [device], args, shape, made, "pinned_host")
    held = sum(q.nbytes for q in training.frozen.values() if isinstance(q, qjax.QTensor))
    rows = [training.measure()]
    stats = device.memory_stats() or {"bytes_limit": 0, "peak_bytes_in_use": 0}
    sizes = {"weights": held, "limit": stats["bytes_limit"], "peak": stats["peak_bytes_in_use"]}
    rows.append(log(**{f"{name}_gib": round(size / 2**30, 2) for name, size in sizes.items()}))

    @jax.jit
    def one_token(adapters, frozen, ids):
        x = hidden_states(adapters, frozen, ids, shape, "xla")
        return jnp.argmax(jnp.dot(x[:, -1], frozen["head"].T), -1)

    ids, times, adapters = training.ids[:1, :1], [], training.adapters
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(one_token(adapters, training.frozen, ids))
        times.append(time.perf_counter() - start)
    seconds = sorted(times[1:])[1]
    rate = held / seconds / 1e9
    rows.append(log(decode="one token", ms=round(seconds * 1e3, 1), gigabytes_per_s=round(rate, 1)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--attention", default="cudnn")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--wait-for", type=pathlib.Path, help="a file: no step on two GPUs before")
    parser.add_argument("--tiny", action="store_true", help="sizes to try the script with")
    args = parser.parse_args()
    shape = TINY if args.tiny else LLAMA_70B if args.offload else Shape()
    if args.layers:
        shape = dataclasses.replace(shape, layers=args.layers)
    rows = (offload if args.offload else two_gpus)(args, shape)
    report = {
        "device": jax.devices()[0].device_kind,
        "date": datetime.date.today().isoformat(),
        "commit": args.commit,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
        "shape": dataclasses.asdict(shape),
        "batch": args.batch,
        "length": args.length,
        "rows": rows,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
