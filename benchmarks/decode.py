"""Generation with Llama shapes on one GPU: tokens/s, prefill, memory, energy, kernels of a step.

python benchmarks/decode.py --out benchmarks/results/decode.json
    [--shapes llama-2-7b] [--batch 1,32] [--adapters on,off] [--prompt 64] [--new 192]
    [--prefill 2048] [--float] [--profile kernels.json]

Random NF4 weights with double quantization; greedy; the rates count the whole call of `generate`,
prefill included. `--prefill` times a prompt of so many tokens and one new token. `--float` has
bfloat16 weights in place of NF4.
"""

import argparse
import json
import pathlib
import time
from concurrent.futures import ThreadPoolExecutor

import jax
from flax import nnx

from benchmarks.finetune import save
from benchmarks.gpu_meter import breakdown, kernels, metering, peak_gib
from benchmarks.llm_models import random_model, shape, weight_bytes

REPEATS = 3


def without_adapters(model):
    """Return the model, its arrays shared, without adapters."""
    model = nnx.merge(*nnx.split(model))
    for _, layer in nnx.iter_modules(model):
        if getattr(layer, "lora_a", None) is not None:
            layer.drop_adapter()
    return model


def prompt(model, batch: int, length: int) -> jax.Array:
    """Return random ids."""
    return jax.random.randint(jax.random.key(2), (batch, length), 0, model.config.vocab_size)


def seconds(call) -> list[float]:
    """Return the times of some calls, the least first."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return sorted(times)


def run(args, name: str) -> list[dict]:
    """Measure one shape."""
    model = random_model(shape(name), quantized=not args.float, rank=None if args.float else 16)
    models = {"on": model, "off": without_adapters(model)}
    held = weight_bytes(models["off"])
    cases = [
        (adapters, int(batch), args.prompt, args.new)
        for adapters in args.adapters.split(",")
        for batch in args.batch.split(",")
    ]
    if args.prefill:
        cases.append((args.adapters.split(",")[-1], 1, args.prefill, 1))

    def call(adapters, batch, length, new):
        chosen = models[adapters]
        return chosen.generate(prompt(chosen, batch, length), max_new_tokens=new)

    def warm(case):
        try:
            start = time.perf_counter()
            jax.block_until_ready(call(*case))
            print(case, "compiled in", round(time.perf_counter() - start, 1), flush=True)
        except Exception as error:  # the other cases still count
            return repr(error)[:2000]
        return None

    with ThreadPoolExecutor(8) as pool:
        errors = list(pool.map(warm, cases))
    rows, profiles = [], {}
    for case, error in zip(cases, errors):
        adapters, batch, length, new = case
        row: dict = {"shape": name, "weights": "bfloat16" if args.float else "nf4"}
        row |= {"adapters": adapters, "batch": batch, "prompt": length, "new": new}
        if error is None:
            with metering() as meter:
                times = seconds(lambda case=case: call(*case))
            best = times[len(times) // 2]
            rate = batch * (new if new > 1 else length) / best
            row |= {
                "seconds": [round(t, 4) for t in times],
                "tokens_per_s": round(rate, 1),
                "joules_per_token": meter.watts and round(meter.watts / rate, 4),
                "weights_gib": round(held / 2**30, 2),
                "peak_gib": peak_gib(),
                "smi_peak_mib": meter.peak_mib,
            }
            if args.profile:
                found = kernels(lambda case=case: call(*case))
                row["parts_us"] = breakdown(found)
                profiles[f"{adapters} batch {batch} prompt {length}"] = found
        else:
            row["error"] = error
        print(json.dumps(row), flush=True)
        rows.append(row)
    if args.profile:
        args.profile.write_text(json.dumps(profiles))
    return rows


def main() -> None:
    """Run the shapes that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--shapes", default="llama-2-7b")
    parser.add_argument("--batch", default="1,32")
    parser.add_argument("--adapters", default="on,off")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=192)
    parser.add_argument("--prefill", type=int, default=0)
    parser.add_argument("--float", action="store_true")
    parser.add_argument("--profile", type=pathlib.Path)
    args = parser.parse_args()
    for name in args.shapes.split(","):
        save(args.out, run(args, name))


if __name__ == "__main__":
    main()
