"""Time of products with many rows of x on a Hopper GPU: each tile choice, and decoding first.

python benchmarks/matmul_large.py --out FILE [--shapes 4096x14336,...] [--rows 256,512,1024]
    [--transpose]

Measured as in benchmarks/matmul.py. Each tile choice is checked against the decoded product; one
that fails to compile, or is wrong, says so and does not end the run. `bandwidth` rows are bytes
read and written by dequantize and quantize, over their time.
"""

import argparse
import functools
import json
import pathlib
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import matmul as bench

import pallas_kernels
from pallas_kernels.matmul import decoded, mosaic_large
from pallas_kernels.matmul.config_large import LARGE_TILES


def product(x, ws, codes, *, function):
    multiply = jax.jit(functools.partial(function, block_size=bench.BLOCK))  # lowered once
    return [multiply(x, packed, scales, codes) for packed, scales in ws]


def functions(transpose: bool) -> dict:
    """Every way to multiply, by name."""
    ways = {"decoded": functools.partial(decoded.matmul, transpose=transpose)}
    for tiles in LARGE_TILES:
        name = f"{tiles.rows} rows, split {tiles.split}"
        ways[name] = functools.partial(mosaic_large.matmul, transpose=transpose, config=tiles)
    return ways


def measure(k: int, n: int, m: int, transpose: bool) -> list[dict]:
    arrays = bench.inputs(m, n if transpose else k), bench.weights(n, k, False), bench.codebook()
    ways = functions(transpose)

    def build(function):
        try:
            return jax.jit(functools.partial(product, function=function)).lower(*arrays).compile()
        except Exception as error:  # one broken choice must not lose the others
            return str(error)[:200]

    with ThreadPoolExecutor(12) as pool:
        compiled = dict(zip(ways, pool.map(build, ways.values())))
    want = compiled["decoded"](*arrays)[-1].astype(jnp.float32)
    rows = []
    for name, run in compiled.items():
        row = {"k": k, "n": n, "m": m, "transpose": transpose, "way": name}
        if isinstance(run, str):
            row["failed"] = run
        else:
            y = run(*arrays)[-1].astype(jnp.float32)
            error = float(jnp.linalg.norm(y - want) / jnp.linalg.norm(want))
            row |= {"us": round(bench.device_time(run, arrays), 1), "error": float(f"{error:.1e}")}
        rows.append(row)
        print(row, flush=True)
    return rows


def bandwidth(k: int, n: int) -> list[dict]:
    ws, codes = bench.weights(n, k, False), bench.codebook()
    dense = bench.dense_weights(n, k)
    size = n * k * (2 + 0.5 + 4 / bench.BLOCK)
    table = jax.device_get(codes)

    def dequantize(ws):
        how = dict(block_size=bench.BLOCK, dtype=jnp.bfloat16)
        return [pallas_kernels.dequantize(*w, codes, **how) for w in ws]

    def quantize(ws):
        return [pallas_kernels.quantize(w, table, block_size=bench.BLOCK) for w in ws]

    rows = []
    for function, arrays in ((dequantize, ws), (quantize, dense)):
        us = bench.device_time(jax.jit(function), (arrays,))
        rows.append({"k": k, "n": n, "op": function.__name__, "us": round(us, 1)})
        rows[-1]["tb_per_s"] = round(size / us / 1e6, 2)
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--shapes", default="4096x14336,14336x4096,4096x4096")
    parser.add_argument("--rows", default="256,512,1024,2048,4096,8192")
    parser.add_argument("--transpose", action="store_true")
    args = parser.parse_args()
    result = {"device": jax.devices()[0].device_kind, "matmul": [], "bandwidth": []}
    for shape in args.shapes.split(","):
        k, n = map(int, shape.split("x"))
        result["bandwidth"] += bandwidth(k, n)
        for m in args.rows.split(","):
            result["matmul"] += measure(k, n, int(m), args.transpose)
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
