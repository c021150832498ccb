"""QLoRA training of Llama shapes on one GPU: tokens/s, memory, energy, and where the time goes.

python benchmarks/finetune.py --out benchmarks/results/finetune.json
    [--cases llama-2-7b/nf4/4x2048,llama-2-7b/bf16/4x2048] [--saves attention]
    [--profile kernels.json] [--steps 5]

A case is shape/weights/batch x tokens.
Random NF4 weights with double quantization, rank-16 float32 adapters on all linear layers of the
blocks, AdamW, bfloat16 activations, blocks recomputed in the backward pass; bf16 has float weights
in place of NF4. `peer_transformers.py` does the same by transformers, bitsandbytes and PEFT.
Peaks are those of the process so far: name the cases by size.
"""

import argparse
import functools
import json
import pathlib
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.gpu_meter import breakdown, kernels, metering, peak_gib
from benchmarks.llm_models import abstract_model, parameters, random_model, shape, weight_bytes

PEAK_FLOPS = 989e12  # bf16 of an H100 SXM, dense


def model_flops(config, batch: int, length: int) -> float:
    """FLOPs of a step that frozen weights need: two products a weight, causal attention thrice."""
    blocks, head = parameters(config)
    width = config.num_attention_heads * config.head_dim
    attention = 2 * length * width * config.num_hidden_layers  # causal: half of 4 T width
    return batch * length * (4 * (blocks + head) + 3 * attention)


def make_step(graphdef, tx):
    """Return the jitted step of the adapters, the optimizer's state, the rest and the tokens."""

    def step(adapters, state, rest, ids):
        def loss_fn(adapters):
            return nnx.merge(graphdef, adapters, rest).loss(ids)

        loss, grads = jax.value_and_grad(loss_fn)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def compile_case(args, case: str):
    """Compile a case from shapes alone, or return why it cannot be."""
    name, weights, size = case.split("/")
    batch, length = map(int, size.split("x"))
    config = shape(name, remat_saves=tuple(filter(None, args.saves.split(","))))
    try:
        model = abstract_model(config, quantized=weights == "nf4", rank=args.rank)
        graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
        tx = optax.adamw(1e-4)
        state = jax.eval_shape(tx.init, adapters)
        ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        start = time.perf_counter()
        compiled = make_step(graphdef, tx).lower(adapters, state, rest, ids).compile()
        print(case, "compiled in", round(time.perf_counter() - start, 1), flush=True)
        return compiled, config, batch, length
    except Exception as error:  # the other cases still count
        return repr(error)[:2000]


def run(args, case: str, found) -> dict:
    """Measure one case."""
    if isinstance(found, str):
        return {"case": case, "error": found}
    compiled, config, batch, length = found
    model = random_model(config, quantized="/nf4/" in case, rank=args.rank)
    held = weight_bytes(model)
    _, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    state = optax.adamw(1e-4).init(adapters)
    del model
    ids = jax.random.randint(jax.random.key(1), (batch, length), 0, config.vocab_size, jnp.int32)
    losses, times = [], []

    def steps(count):
        nonlocal adapters, state
        for _ in range(count):
            start = time.perf_counter()
            adapters, state, loss = compiled(adapters, state, rest, ids)
            losses.append(round(float(loss), 4))
            times.append(time.perf_counter() - start)

    steps(2)
    times.clear()
    with metering() as samples:
        steps(args.steps)
    step_time = sorted(times)[len(times) // 2]
    tokens = batch * length
    memory = compiled.memory_analysis()
    row = {
        "case": case,
        "saves": args.saves,
        "tokens_per_s": round(tokens / step_time),
        "step_ms": round(step_time * 1e3, 1),
        "steps_ms": [round(t * 1e3, 1) for t in times],
        "mfu": round(model_flops(config, batch, length) / step_time / PEAK_FLOPS, 3),
        "weights_gib": round(held / 2**30, 2),
        "peak_gib": peak_gib(),
        "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 2),
        "temporary_gib": round(memory.temp_size_in_bytes / 2**30, 2),
        "smi_peak_mib": samples.peak_mib,
        "joules_per_token": samples.watts and round(samples.watts * step_time / tokens, 4),
        "losses": losses,
    }
    if args.profile:
        rows = kernels(lambda: compiled(adapters, state, rest, ids))
        row["parts_us"] = breakdown(rows)
        args.profile.write_text(json.dumps(rows, indent=0))
    return row


def save(path: pathlib.Path, rows: list[dict], commit: str) -> None:
    """Add rows, measured at a commit, to a results file."""
    report = json.loads(path.read_text()) if path.exists() else {"rows": []}
    device = jax.devices()[0]
    report |= {"device": device.device_kind, "jax": jax.__version__}
    report["rows"] += [row | {"commit": commit} for row in rows]
    path.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    """Run the shapes that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--cases", default="llama-2-7b/nf4/4x2048")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--saves", default="attention")
    parser.add_argument("--commit", required=True, help="what is measured: the results say it")
    parser.add_argument("--profile", type=pathlib.Path, help="kernels of the last case")
    args = parser.parse_args()
    cases = args.cases.split(",")
    with ThreadPoolExecutor(8) as pool:
        compiled = list(pool.map(functools.partial(compile_case, args), cases))
    for case, found in zip(cases, compiled):
        row = run(args, case, found)
        print(json.dumps(row), flush=True)
        save(args.out, [row], args.commit)


if __name__ == "__main__":
    main()
