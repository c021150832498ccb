"""Generation with Llama shapes on one GPU: tokens/s, prefill, memory, energy, kernels of a step.

python benchmarks/decode.py --out benchmarks/results/decode.json
    --commit $(git rev-parse --short HEAD)
    [--cases llama-2-7b/nf4/off/1x64+192,llama-2-7b/bf16/off/1x2048+1] [--profile kernels.json]

A case is shape/weights/adapters/batch x prompt + new tokens, then any of /unfused (a layer for each
projection), /list (blocks in a list, not stacked), /int8 and /int4 (of the cache). Random NF4
weights with double quantization, or bfloat16; greedy. A rate counts the whole call of `generate`,
prefill included: new tokens a second, or tokens of the prompt where one new token is asked for.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from flax import nnx

from benchmarks.finetune import save
from benchmarks.gpu_meter import breakdown, kernels, metering, peak_gib
from benchmarks.llm_models import random_model, shape, weight_bytes

REPEATS = 3
CASES = [
    "llama-2-7b/nf4/off/1x64+192",
    "llama-2-7b/nf4/on/1x64+192",
    "llama-2-7b/nf4/off/32x64+192",
]
CASE = re.compile(r"(.*)/(nf4|bf16)/(on|off)/(\d+)x(\d+)\+(\d+)((?:/\w+)*)")
KINDS = {"", "unfused", "list", "int8", "int4"}


def without_adapters(model):
    """Return the model, its arrays shared, without adapters."""
    model = nnx.merge(*nnx.split(model))
    for _, layer in nnx.iter_modules(model):
        if getattr(layer, "lora_a", None) is not None:
            layer.drop_adapter()
    return model


class Case:
    """A call of `generate`."""

    def __init__(self, text: str, models: dict):
        name, weights, self.adapters, *sizes, kinds = CASE.fullmatch(text).groups()
        self.text, known = text, set(kinds.split("/"))
        if not known <= KINDS:
            raise ValueError(f"{text} ends in {kinds}, must be of {sorted(KINDS)}")
        self.kv_format = next(iter(known & {"int8", "int4"}), None)
        self.batch, self.prompt, self.new = map(int, sizes)
        key = name, weights, frozenset(known & {"unfused", "list"})
        if key not in models:
            options = {"quantized": weights == "nf4", "rank": 16 if weights == "nf4" else None}
            config = dataclasses.replace(shape(name), scan_layers="list" not in known)
            models[key] = random_model(config, **options, fused="unfused" not in known)
        model = models[key]
        self.model = model if self.adapters == "on" else without_adapters(model)
        random = np.random.default_rng(0)
        self.ids = random.integers(0, model.config.vocab_size, (self.batch, self.prompt))

    def __call__(self):
        how = {"max_new_tokens": self.new, "kv_format": self.kv_format}
        return jax.block_until_ready(self.model.generate(self.ids, **how))

    def warm(self) -> str | None:
        """Compile; return why it could not be done."""
        try:
            start = time.perf_counter()
            self()
            print(self.text, "compiled in", round(time.perf_counter() - start, 1), flush=True)
        except Exception as error:  # the other cases still count
            return repr(error)[:2000]
        return None

    def measure(self, profiles: dict | None) -> dict:
        """Time some calls, and profile one."""
        times = []
        with metering() as meter:
            for _ in range(REPEATS):
                start = time.perf_counter()
                self()
                times.append(time.perf_counter() - start)
        seconds = sorted(times)[len(times) // 2]
        rate = self.batch * (self.new if self.new > 1 else self.prompt) / seconds
        row = {
            "tokens_per_s": round(rate, 1),
            "seconds": [round(t, 4) for t in times],
            "joules_per_token": meter.watts and round(meter.watts / rate, 4),
            "weights_gib": round(weight_bytes(self.model) / 2**30, 2),
            "peak_gib": peak_gib(),
            "smi_peak_mib": meter.peak_mib,
        }
        if profiles is not None:
            profiles[self.text] = kernels(self)
            row["parts_us"] = breakdown(profiles[self.text])
        return row


def main() -> None:
    """Run the cases that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--commit", required=True, help="what is measured: the results say it")
    parser.add_argument("--profile", type=pathlib.Path)
    args = parser.parse_args()
    models: dict = {}
    cases = [Case(text, models) for text in args.cases.split(",")]
    with ThreadPoolExecutor(12) as pool:
        errors = list(pool.map(Case.warm, cases))
    profiles: dict | None = {} if args.profile else None
    for case, error in zip(cases, errors):
        row = {"case": case.text} | ({"error": error} if error else case.measure(profiles))
        print(json.dumps(row), flush=True)
        save(args.out, [row], args.commit)
    if profiles is not None:
        args.profile.write_text(json.dumps(profiles))


if __name__ == "__main__":
    main()
