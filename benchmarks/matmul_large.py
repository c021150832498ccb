"""Time of products with many rows of x on a Hopper GPU: each tile choice, and decoding first.

python benchmarks/matmul_large.py --out FILE [--shapes 4096x14336,...] [--rows 256,512,1024]
    [--directions forward,backward] [--ways decoded,256x4x2]

Measured as in benchmarks/matmul.py, beside torch bf16 in the same run. A way is the fields of
`LargeTiles`, or `decoded`. One that fails to compile says so and does not end the run.
"""

import argparse
import collections
import dataclasses
import functools
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import matmul
import matmul_cells
from matmul_cells import Cell

TORCH_SECONDS = 60


def functions(names: str) -> dict[str, Callable]:
    """The ways to multiply, by name; all if none are named."""
    from pallas_kernels.matmul import decoded, mosaic_large
    from pallas_kernels.matmul.config_large import LARGE_TILES, LargeTiles

    tiles = {"x".join(map(str, dataclasses.astuple(t))): t for t in LARGE_TILES}
    for name in filter(None, names.split(",")):
        if name != "decoded":
            tiles[name] = LargeTiles(*map(int, name.split("x")))
    ways: dict[str, Callable] = {
        name: functools.partial(mosaic_large.matmul, config=t) for name, t in tiles.items()
    }
    ways["decoded"] = decoded.matmul
    return {name: way for name, way in ways.items() if not names or name in names.split(",")}


def compile_way(cell: Cell, way: Callable):
    """One function of lists of x and of weights, or why it does not compile."""
    import jax
    import matmul_jax

    codebook = jax.numpy.asarray(matmul_jax.CODEBOOK)
    one = jax.jit(
        lambda x, w: way(x, *w, codebook, block_size=matmul_cells.BLOCK, transpose=cell.transpose)
    )
    x, w = matmul_jax.abstract_arguments(cell)
    count = matmul_cells.copies(matmul_jax.nbytes(cell))
    many = jax.jit(lambda xs, ws: [one(x, w) for x, w in zip(xs, ws, strict=True)])
    try:
        return many.lower([x] * count, [w] * count).compile()
    except Exception as error:  # one broken choice must not lose the others
        return f"{type(error).__name__}: {str(error)[:200]}"


def measure(
    cells: list[tuple[Cell, str]], ways: dict[str, Callable], wait: Callable[[], object]
) -> list[dict]:
    """A row of each (cell, way); `wait` is called before the GPU is timed."""
    import matmul_jax

    bench = matmul_jax.Bench(time.time() + 3600)
    # XLA tries its dots on the GPU while it compiles: they wait for the kernels.
    kernels = [(cell, way) for cell, way in cells if way != "decoded"]
    dots = [(cell, way) for cell, way in cells if way == "decoded"]
    rows, checks = [], []
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) - 2)) as pool:
        for work in (kernels, dots):
            compiled = pool.map(lambda item: compile_way(item[0], ways[item[1]]), work)
            if work is kernels:
                wait()
            for (cell, way), run in zip(work, list(compiled), strict=True):
                row = dataclasses.asdict(cell) | {"library": way}
                rows.append(row)
                if isinstance(run, str):
                    row["failed"] = run
                else:
                    us, error = bench.measure(cell, run)
                    row["us"] = round(us, 1)
                    checks.append((row, error))
                print(row, flush=True)
    for row, error in checks:
        row["error"] = float(f"{error.result():.1e}")
    return rows


def table(rows: list[dict]) -> str:
    """A line for each shape: torch's time, then each way's ratio to it and time, best first."""
    cells = collections.defaultdict(dict)
    for row in rows:
        if "us" in row:
            cells[row["k"], row["n"], row["m"], row["transpose"]][row["library"]] = row["us"]
    lines = []
    for (k, n, m, transpose), times in cells.items():
        torch = times.pop(matmul_cells.REFERENCE, float("nan"))
        best = sorted(times.items(), key=lambda item: item[1])
        found = "  ".join(f"{torch / us:.2f} {way} {us:.1f}" for way, us in best)
        lines.append(f"{k}x{n} M={m}{' dX' if transpose else ''} torch {torch:.1f}  {found}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--shapes", default="4096x14336,14336x4096,4096x4096")
    parser.add_argument("--rows", default="256,512,1024,2048,4096,8192")
    parser.add_argument("--directions", default="forward,backward")
    parser.add_argument("--ways", default="")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
    cells = [
        Cell(matmul_cells.REFERENCE, *map(int, shape.split("x")), int(m), way == "backward")
        for shape in args.shapes.split(",")
        for m in args.rows.split(",")
        for way in args.directions.split(",")
    ]
    with tempfile.TemporaryDirectory() as folder:
        torch = matmul.start_torch(cells, pathlib.Path(folder), time.time() + TORCH_SECONDS)
        ways = functions(args.ways)
        ours = [(dataclasses.replace(cell, library="qjax"), way) for cell in cells for way in ways]
        rows = measure(ours, ways, torch.wait)
        rows += matmul.torch_rows(pathlib.Path(folder) / "torch.jsonl")[1]
    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    sys.exit(any(row.get("error", 1) > 0.01 for row in rows))


if __name__ == "__main__":
    main()
