"""Tokens a second of SmolLM2-135M on this machine's CPU: NF4 against float32 and bfloat16.

python benchmarks/cpu_decode.py [--new 32] [--repeats 5]

Needs the weights that `make demo` installs. Greedy, batch 1, whole calls of `generate` after one
that compiles; the three take turns, and the median counts. Run it on a quiet machine.
"""

import argparse
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.demo.model import weights_file


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    nf4 = qjax.QuantConfig(compute_dtype=jnp.float32)
    models = {
        "nf4": qjax.from_pretrained(weights_file(), dtype=jnp.float32, config=nf4),
        "float32": qjax.from_pretrained(weights_file(), dtype=jnp.float32),
        "bfloat16": qjax.from_pretrained(weights_file(), dtype=jnp.bfloat16),
    }
    ids = np.arange(1, 17, dtype=np.int32)[None]
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(args.repeats + 1):
        for name, model in models.items():
            start = time.perf_counter()
            jax.block_until_ready(model.generate(ids, max_new_tokens=args.new))
            if turn:  # the first compiles
                times[name].append(time.perf_counter() - start)
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.1f}")
    for name, seconds in times.items():
        median = sorted(seconds)[len(seconds) // 2]
        print(
            f"{name}: {args.new / median:.1f} tokens/s ({min(seconds):.3f} to {max(seconds):.3f} s)"
        )


if __name__ == "__main__":
    main()
