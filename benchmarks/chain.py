"""Wall time of a chain of dependent layers, 4-bit against bf16, with and without CUDA graphs.

python benchmarks/chain.py [--out FILE] [--rows 1,16,64] [--pairs 32]
    [--shapes 4096x14336,4096x4096] [--between none,silu]

A shape K x N is a pair of products, K to N and back; every pair has its own weights. Between
products lies nothing, or a silu, which XLA merges into its own product of one row of bf16. Wall
time of a compiled chain, median of 15 runs issued without waiting in between, over the number of
products. `graph` compiles with XLA's command buffers, which replay a captured CUDA graph; without
it XLA's defaults rule.
"""

import argparse
import functools
import itertools
import json
import pathlib
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

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


def chain(kind: str, between: str, x: jax.Array, weights: list) -> jax.Array:
    product = jax.jit(functools.partial(multiply, kind))  # lowered once a shape
    for weight in weights:
        x = product(x, weight)
        if between == "silu":
            x = jax.nn.silu(x)
    return x


def arguments(k: int, n: int, m: int, pairs: int, kind: str) -> tuple[jax.Array, list]:
    keys = jax.random.split(jax.random.key(0), 2 * pairs)
    shapes = [(n, k), (k, n)] * pairs
    weights = [make_weight(key, *shape, kind) for key, shape in zip(keys, shapes, strict=True)]
    return jax.random.normal(jax.random.key(1), (m, k), jnp.bfloat16), weights


def compile_chain(k: int, n: int, m: int, pairs: int, kind: str, between: str, options: dict):
    args = jax.eval_shape(lambda: arguments(k, n, m, pairs, kind))
    lowered = jax.jit(functools.partial(chain, kind, between)).lower(*args)
    return lowered.compile(compiler_options=options)


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
    parser.add_argument("--between", default="none,silu")
    args = parser.parse_args()
    sizes = [
        (*map(int, shape.split("x")), int(m), args.pairs)
        for shape in args.shapes.split(",")
        for m in args.rows.split(",")
    ]
    ways = {"default": {}, "graph": GRAPH}
    steps = args.between.split(",")
    with ThreadPoolExecutor() as pool:
        compiled = {
            (size, kind, step, way): pool.submit(compile_chain, *size, kind, step, options)
            for size in sizes
            for kind in ("bf16", "nf4")
            for step in steps
            for way, options in ways.items()
        }
    for size in sizes:
        figures = {step: {} for step in steps}
        for kind in ("bf16", "nf4"):
            x, weights = arguments(*size, kind)
            for step, way in itertools.product(steps, ways):
                seconds = wall(compiled[size, kind, step, way].result(), x, weights)
                figures[step][f"{kind}_{way}_us"] = round(seconds * 1e6 / len(weights), 2)
            del weights
        for step, times in figures.items():
            settings = dict(zip(("k", "n", "m", "pairs"), size, strict=True)) | {"between": step}
            for way in ways:
                times[f"{way}_ratio"] = round(times[f"bf16_{way}_us"] / times[f"nf4_{way}_us"], 2)
            print(json.dumps(settings | times), flush=True)
            if args.out:
                matmul_report.put(args.out, "chain", settings, times)


if __name__ == "__main__":
    main()
