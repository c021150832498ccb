"""Time of x @ W.T with 4-bit W on a GPU, by implementation, against bfloat16 in the same process.

python benchmarks/matmul.py --out benchmarks/results/nvidia-h100.json
    [--shapes 4096x14336,14336x4096,4096x4096] [--rows 1,8,16,32,64,128] [--double]
    [--implementations mosaic_gpu,triton,xla]

A shape is K x N. One jitted function multiplies by 8 distinct weights, so that the L2 cache does
not hold them; its time is the median over runs of the sum of its kernels on the device (CUPTI),
over 8. Everything compiles first, in threads. Each result is checked against the decoded weight in
float32. Rows already in the file are replaced.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.dequantize.reference import dequantize
from pallas_kernels.scales import DoubleQuantScales

COPIES, BLOCK, REPEATS = 8, 64, 7
SHAPES = "4096x14336,14336x4096,4096x4096,4096x11008,11008x4096,8192x28672"


@dataclasses.dataclass(frozen=True)
class Case:
    """One cell of the table."""

    k: int
    n: int
    m: int
    implementation: str
    double: bool = False


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_weight(key: jax.Array, n: int, k: int, double: bool):
    packed_key, scale_key, second_key = jax.random.split(key, 3)
    packed = jax.random.bits(packed_key, (n, k // 2), jnp.uint8)
    blocks = (n, k // BLOCK)
    if not double:
        return packed, jax.random.uniform(scale_key, blocks, jnp.float32, 0.02, 0.1)
    codes = jax.random.bits(scale_key, blocks, jnp.uint8)
    absmax = jax.random.uniform(second_key, (-(-n * k // BLOCK // 256),), jnp.float32, 0.01, 0.04)
    table = jnp.linspace(-1, 1, 256, dtype=jnp.float32)
    return packed, DoubleQuantScales(codes, absmax, jnp.float32(0.06), table)


@functools.cache
def weights(n: int, k: int, double: bool):
    return [random_weight(jax.random.key(i), n, k, double) for i in range(COPIES)]


@functools.cache
def dense_weights(n: int, k: int):
    keys = jax.random.split(jax.random.key(0), COPIES)
    return [jax.random.normal(key, (n, k), jnp.bfloat16) for key in keys]


def codebook() -> jax.Array:
    return jnp.linspace(-1, 1, 16, dtype=jnp.float32)


def inputs(m: int, k: int) -> jax.Array:
    return jax.random.normal(jax.random.key(3), (m, k), jnp.bfloat16)


def arguments(case: Case):
    dense = case.implementation == "bf16"
    w = dense_weights(case.n, case.k) if dense else weights(case.n, case.k, case.double)
    return inputs(case.m, case.k), w, codebook()


def compile_case(case: Case):
    """The compiled function of a case, or why there is none."""

    def dense(x, ws, _):
        contract = (((1,), (1,)), ((), ()))
        dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        return [dot(x, w, contract).astype(x.dtype) for w in ws]

    def quantized(x, ws, codes):
        multiply = functools.partial(
            pallas_kernels.matmul, block_size=BLOCK, implementation=case.implementation
        )
        return [multiply(x, packed, scales, codes) for packed, scales in ws]

    function = dense if case.implementation == "bf16" else quantized
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments(case))
    try:
        return jax.jit(function).lower(*shapes).compile()
    except NotImplementedError as error:
        return str(error)


def device_time(compiled, arrays) -> float:
    """Microseconds of one product."""
    from jax.experimental.mosaic.gpu import profiler  # only where there is a GPU

    jax.block_until_ready(compiled(*arrays))
    measure = profiler.Cupti(finalize=False).measure
    _, runs = measure(compiled, aggregate=False, iterations=REPEATS)(*arrays)
    return statistics.median(sum(ms for _, ms in run) for run in runs) * 1e3 / COPIES


def relative_error(compiled, arrays) -> float:
    """||y - reference|| / ||reference|| of the last weight."""
    x, ws, codes = arrays
    packed, scales = ws[-1]
    w = jax.jit(functools.partial(dequantize, block_size=BLOCK))(packed, scales, codes)
    want = jnp.dot(x.astype(jnp.float32), w.T, precision="highest")
    y = compiled(*arrays)[-1].astype(jnp.float32)
    return float(jnp.linalg.norm(y - want) / jnp.linalg.norm(want))


def run(cases: list[Case]) -> list[dict]:
    """Measure the cases; those of one shape and M are compared with its bfloat16 time."""
    dense = sorted({Case(c.k, c.n, c.m, "bf16") for c in cases}, key=dataclasses.astuple)
    with ThreadPoolExecutor(12) as pool:
        compiled = dict(zip([*dense, *cases], pool.map(compile_case, [*dense, *cases])))
    base = {}
    for case in dense:
        base[case.k, case.n, case.m] = device_time(compiled[case], arguments(case))
    dense_weights.cache_clear()
    rows = []
    for case in cases:
        row, bf16 = dataclasses.asdict(case), base[case.k, case.n, case.m]
        if isinstance(compiled[case], str):
            rows.append(row | {"refused": compiled[case]})
            continue
        us, error = (f(compiled[case], arguments(case)) for f in (device_time, relative_error))
        row |= {"us": round(us, 2), "bf16_us": round(bf16, 2), "ratio": round(bf16 / us, 2)}
        rows.append(row | {"error": float(f"{error:.2g}")})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def merge(path: pathlib.Path, rows: list[dict]) -> None:
    """Write the rows into a results file, in place of those of the same cells."""
    fields = [field.name for field in dataclasses.fields(Case)]
    report = json.loads(path.read_text()) if path.exists() else {"rows": []}
    new = {tuple(row[f] for f in fields) for row in rows}
    kept = [row for row in report["rows"] if tuple(row[f] for f in fields) not in new]
    device = jax.devices()[0]
    report |= {"device": device.device_kind, "jax": jax.__version__}
    report["rows"] = sorted(kept + rows, key=lambda row: [row[f] for f in fields])
    path.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,128")
    parser.add_argument("--implementations", default="mosaic_gpu,triton,xla")
    parser.add_argument("--double", action="store_true")
    args = parser.parse_args()
    cases = [
        Case(*map(int, shape.split("x")), int(m), implementation, args.double)
        for shape in args.shapes.split(",")
        for m in args.rows.split(",")
        for implementation in args.implementations.split(",")
    ]
    merge(args.out, run(cases))


if __name__ == "__main__":
    main()
