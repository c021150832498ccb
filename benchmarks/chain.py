"""Wall time of a chain of dependent layers, 4-bit against bf16, with and without CUDA graphs.

python benchmarks/chain.py [--out FILE] [--rows 1,16,64] [--pairs 32]
    [--shapes 4096x14336,4096x4096]

A shape K x N is a pair of products, K to N and back, each followed by an elementwise step, as in a
transformer's MLP; every pair has its own weights. Wall time of a compiled chain, median of 15 runs
issued without waiting in between, over the number of products. `graph` compiles with XLA's command
buffers, which replay a captured CUDA graph; without it XLA's defaults rule.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import matmul_report
from decode_step import BLOCK, GRAPH, random_weight

import pallas_kernels

RUNS, WARMUP = 15, 3


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def make_weight(key: jax.Array, n: int, k: int, kind: str):
    if kind == "bf16":
        return 0.02 * jax.random.normal(key, (n, k), jnp.bfloat16)
    return random_weight(key, n, k, double=False)


def multiply(kind: str, x: jax.Array, weight) -> jax.Array:
    if kind == "bf16":
        return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))
    codebook = jnp.linspace(-1, 1, 16, dtype=jnp.float32)
    return pallas_kernels.matmul(x, *weight, codebook, block_size=BLOCK)


def chain(kind: str, x: jax.Array, weights: list) -> jax.Array:
    product = jax.jit(functools.partial(multiply, kind))  # lowered once a shape
    for weight in weights:
        x = jax.nn.silu(product(x, weight))
    return x


def measure(k: int, n: int, m: int, pairs: int, kind: str) -> dict[str, float]:
    """Microseconds of a product, by way of compiling."""
    keys = jax.random.split(jax.random.key(0), 2 * pairs)
    shapes = [(n, k), (k, n)] * pairs
    weights = [make_weight(key, *shape, kind) for key, shape in zip(keys, shapes, strict=True)]
    x = jax.random.normal(jax.random.key(1), (m, k), jnp.bfloat16)
    lowered = jax.jit(functools.partial(chain, kind)).lower(x, weights)
    times = {}
    for name, options in (("default", {}), ("graph", GRAPH)):
        compiled = lowered.compile(compiler_options=options)
        times[name] = round(wall(compiled, x, weights) * 1e6 / (2 * pairs), 2)
    return times


def wall(compiled, *arguments) -> float:
    """Seconds of a run: the median over batches of 4 in flight."""
    seconds = []
    for i in range(WARMUP + RUNS):
        start = time.perf_counter()
        jax.block_until_ready([compiled(*arguments) for _ in range(4)])
        if i >= WARMUP:
            seconds.append((time.perf_counter() - start) / 4)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--rows", default="1,16,64")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--shapes", default="4096x14336,4096x4096")
    args = parser.parse_args()
    for shape in args.shapes.split(","):
        k, n = map(int, shape.split("x"))
        for m in map(int, args.rows.split(",")):
            settings = {"k": k, "n": n, "m": m, "pairs": args.pairs}
            figures = {}
            for kind in ("bf16", "nf4"):
                times = measure(k, n, m, args.pairs, kind)
                figures |= {f"{kind}_{name}_us": us for name, us in times.items()}
            for name in ("default", "graph"):
                ratio = figures[f"bf16_{name}_us"] / figures[f"nf4_{name}_us"]
                figures[f"{name}_ratio"] = round(ratio, 2)
            print(json.dumps(settings | figures), flush=True)
            if args.out:
                matmul_report.put(args.out, "chain", settings, figures)


if __name__ == "__main__":
    main()
