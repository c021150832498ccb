"""Time the CPU's NF4 matmul against dequantize-then-dot: `python benchmarks/cpu_matmul.py`.

Writes benchmarks/results/cpu.json, milliseconds a call: median of the repetitions, after one
warm-up, the two sides in turn so that a busy machine slows both.
"""

import json
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import matmul
from pallas_kernels.matmul import reference
from qjax.core.codebook import codebook

SHAPES = [(4096, 4096), (11008, 4096), (1536, 576)]  # (N, K)
ROWS = [1, 8, 64, 128]
BLOCK, REPEATS = 64, 15
RESULT = Path(__file__).parent / "results" / "cpu.json"


def milliseconds(function, *args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return (time.perf_counter() - start) * 1e3


def measure(n: int, k: int, m: int, transpose: bool) -> dict:
    rng = np.random.default_rng(0)
    packed = jnp.asarray(rng.integers(0, 256, (n, k // 2), np.uint8))
    scales = jnp.asarray(rng.uniform(0.5, 1, (n, k // BLOCK)).astype(np.float32))
    x = jnp.asarray(rng.standard_normal((m, n if transpose else k)).astype(np.float32))
    args = x, packed, scales, jnp.asarray(codebook("nf4"))
    options = {"block_size": BLOCK, "transpose": transpose}
    sides = {
        "qjax": jax.jit(lambda *a: matmul(*a, **options)),
        "dequantize_then_dot": jax.jit(lambda *a: reference.matmul(*a, **options)),
    }
    first, second = (f(*args) for f in sides.values())
    error = float(jnp.linalg.norm(first - second) / jnp.linalg.norm(second))
    assert error < 1e-5, f"the two sides differ by {error}"
    times = {name: [] for name in sides}
    for _ in range(REPEATS):
        for name, function in sides.items():
            times[name].append(milliseconds(function, *args))
    row = {"N": n, "K": k, "M": m, "transpose": transpose}
    row |= {name: round(statistics.median(t), 3) for name, t in times.items()}
    return row | {"speedup": round(row["dequantize_then_dot"] / row["qjax"], 2)}


def main() -> None:
    rows = []
    for n, k in SHAPES:
        for m in ROWS:
            for transpose in (False, True):
                rows.append(measure(n, k, m, transpose))
                print(rows[-1], flush=True)
    machine = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # above the number of cores, times are other programs' too
        "jax": jax.__version__,
    }
    RESULT.write_text(json.dumps({"machine": machine, "milliseconds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
