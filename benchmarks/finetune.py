"""QLoRA training of Llama shapes on one GPU: tokens/s, memory, energy, and where the time goes.

python benchmarks/finetune.py --out benchmarks/results/finetune.json
    [--shapes llama-2-7b] [--batch 4] [--length 2048] [--saves attention,stream] [--float]
    [--profile kernels.json] [--steps 5]

Random NF4 weights with double quantization, rank-16 float32 adapters on all linear layers of the
blocks, AdamW, bfloat16 activations, blocks recomputed in the backward pass. `--float` has bfloat16
weights in place of NF4; `peer_transformers.py` does the same by transformers and bitsandbytes.
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.gpu_meter import breakdown, kernels, metering, peak_gib
from benchmarks.llm_models import parameters, random_model, shape, weight_bytes

PEAK_FLOPS = 989e12  # bf16 of an H100 SXM, dense


def model_flops(config, batch: int, length: int) -> float:
    """FLOPs of a step that frozen weights need: two products a weight, causal attention thrice."""
    blocks, head = parameters(config)
    width = config.num_attention_heads * config.head_dim
    attention = 2 * length * width * config.num_hidden_layers  # causal: half of 4 T width
    return batch * length * (4 * (blocks + head) + 3 * attention)


def make_step(model, tx):
    """Return the jitted step and its state (adapters, optimizer state, the rest)."""
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)

    def step(adapters, state, rest, ids):
        def loss_fn(adapters):
            return nnx.merge(graphdef, adapters, rest).loss(ids)

        loss, grads = jax.value_and_grad(loss_fn)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1)), (adapters, tx.init(adapters), rest)


def run(args, name: str) -> dict:
    """Measure one shape."""
    saves = tuple(filter(None, args.saves.split(",")))
    config = shape(name, remat_saves=saves)
    model = random_model(config, quantized=not args.float, rank=args.rank)
    held = weight_bytes(model)
    step, (adapters, state, rest) = make_step(model, optax.adamw(1e-4))
    del model
    ids = jax.random.randint(
        jax.random.key(1), (args.batch, args.length), 0, config.vocab_size, jnp.int32
    )
    start = time.perf_counter()
    compiled = step.lower(adapters, state, rest, ids).compile()
    seconds = {"compile_s": round(time.perf_counter() - start, 1)}
    print(name, seconds, flush=True)
    losses = []
    for _ in range(2):
        adapters, state, loss = compiled(adapters, state, rest, ids)
        losses.append(float(loss))
    with metering() as meter:
        times = []
        for _ in range(args.steps):
            start = time.perf_counter()
            adapters, state, loss = compiled(adapters, state, rest, ids)
            losses.append(float(loss))
            times.append(time.perf_counter() - start)
    step_time = sorted(times)[len(times) // 2]
    tokens = args.batch * args.length
    flops = model_flops(config, args.batch, args.length)
    memory = compiled.memory_analysis()
    row = {
        "shape": name,
        "weights": "bfloat16" if args.float else "nf4",
        "batch": args.batch,
        "length": args.length,
        "saves": list(saves),
        "tokens_per_s": round(tokens / step_time),
        "step_ms": round(step_time * 1e3, 1),
        "steps_ms": [round(t * 1e3, 1) for t in times],
        "mfu": round(flops / step_time / PEAK_FLOPS, 3),
        "weights_gib": round(held / 2**30, 2),
        "peak_gib": peak_gib(),
        "temporary_gib": round(memory.temp_size_in_bytes / 2**30, 2),
        "smi_peak_mib": meter.peak_mib,
        "joules_per_token": meter.watts and round(meter.watts * step_time / tokens, 4),
        "losses": [round(loss, 4) for loss in losses],
        **seconds,
    }
    print(json.dumps(row), flush=True)
    if args.profile:
        rows = kernels(lambda: compiled(adapters, state, rest, ids))
        row["parts_us"] = breakdown(rows)
        args.profile.write_text(json.dumps(rows, indent=0))
        print(json.dumps(row["parts_us"]), flush=True)
    return row


def save(path: pathlib.Path, rows: list[dict]) -> None:
    """Add rows to a results file."""
    report = json.loads(path.read_text()) if path.exists() else {"rows": []}
    device = jax.devices()[0]
    report |= {"device": device.device_kind, "jax": jax.__version__}
    report["rows"] += rows
    path.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    """Run the shapes that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--shapes", default="llama-2-7b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--saves", default="attention,stream")
    parser.add_argument("--float", action="store_true")
    parser.add_argument("--profile", type=pathlib.Path)
    args = parser.parse_args()
    for name in args.shapes.split(","):
        save(args.out, [run(args, name)])


if __name__ == "__main__":
    main()
