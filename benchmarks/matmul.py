"""Time of y = x W.T with 4-bit W on a GPU, by library, against torch bf16 in the same run.

python benchmarks/matmul.py --out benchmarks/results/nvidia-h100.json --commit $(git rev-parse HEAD)
    [--minutes 5] [--libraries qjax,"torch bf16"] [--shapes 4096x14336] [--rows 1,16]

Without --shapes and --rows the cells of `matmul_cells.wanted` are measured, the most wanted first,
until the minutes are over. A library that cannot be imported is left out. PyTorch runs first, in
a process of its own, while JAX's kernels compile in threads. Rows already in the file are replaced.

Both sides' times are sums of device kernels by CUPTI's activity records, which the profilers of
JAX (Mosaic GPU) and PyTorch (Kineto) both read; medians of 5 repetitions over weights, and
activations, that no cache holds. Every result is checked against the weight in float32.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import matmul_cells
import matmul_report
from matmul_cells import Cell

TORCH_GRACE = 15  # seconds to finish what is under way
SAVE_EVERY = 40  # cells
DOTS = 16  # cells that compile before the first of them is measured
METHOD = (
    "us: sum of the device kernels of one product by CUPTI activity records (JAX by Mosaic GPU's "
    "profiler, PyTorch by Kineto, in processes of their own), median of 5 repetitions over 8 "
    "distinct weights in turn, or fewer of 140 MB together; up to 128 rows each has an x of its "
    "own; reference_us: the same shape in the same run; error: relative, in the 2-norm, against "
    "the decoded weight in float32; ran: the module of qjax that dispatch took"
)


def choose(args: argparse.Namespace) -> list[Cell]:
    """The cells that the command asks for, each with its reference."""
    libraries = args.libraries.split(",") if args.libraries else matmul_cells.LIBRARIES
    cells = matmul_cells.wanted()
    if args.shapes:
        cells = [
            Cell(library, *map(int, shape.split("x")), int(m))
            for shape in args.shapes.split(",")
            for m in args.rows.split(",")
            for library in libraries
        ]
    elif args.rows:
        cells = [cell for cell in cells if str(cell.m) in args.rows.split(",")]
    cells = [cell for cell in cells if cell.library in libraries]
    return list(dict.fromkeys(c for cell in cells for c in (cell.reference, cell)))


def start_torch(cells: list[Cell], folder: pathlib.Path, deadline: float):
    """Start the PyTorch side, which writes `torch.jsonl` into the folder."""
    (folder / "cells.json").write_text(json.dumps([dataclasses.asdict(cell) for cell in cells]))
    script = pathlib.Path(__file__).with_name("matmul_torch.py")
    files = folder / "cells.json", folder / "torch.jsonl"
    return subprocess.Popen([sys.executable, script, *files, str(deadline)])


def torch_rows(out: pathlib.Path) -> tuple[dict, list[dict]]:
    """(versions, rows) that the PyTorch side wrote."""
    lines = out.read_text().splitlines() if out.exists() else []
    head, *rows = [json.loads(line) for line in lines] or [{}]
    return head.get("versions", {}), rows


def jax_rows(bench, cells: Sequence[Cell]) -> list[dict]:
    """The measured cells of the JAX side."""
    found = []
    for cell, us, error in bench.run(cells):
        found.append((cell, us, error))
        print(f"{cell} {us:.2f} us", flush=True)
    rows = []
    for cell, us, error in found:
        row = dataclasses.asdict(cell) | {"us": us, "error": error.result()}
        rows.append(row | {"ran": bench.what_runs(cell)})
    return rows


def machine(versions: dict[str, str], commit: str) -> dict:
    """What the numbers were taken on and with."""
    import jax

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        driver = "none"
    return {
        "device": jax.devices()[0].device_kind,
        "driver": driver,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit,
        "what": "all libraries in one run, device kernels of both sides",
        "method": METHOD,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
        | versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--libraries", default="")
    parser.add_argument("--shapes", default="")
    parser.add_argument("--rows", default="")
    args = parser.parse_args()
    if args.shapes and not args.rows:
        parser.error("--shapes needs --rows")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
    start = time.time()
    cells = choose(args)
    with tempfile.TemporaryDirectory() as folder:
        there = [cell for cell in cells if cell.library in matmul_cells.TORCH]
        # By library, which makes few profiles; the ones that compile kernels last.
        there.sort(key=lambda cell: matmul_cells.TORCH.index(cell.library))
        torch_deadline, deadline = (start + part * args.minutes for part in (30, 60))
        torch = start_torch(there, pathlib.Path(folder), torch_deadline)
        import matmul_jax  # after the other process has started

        bench = matmul_jax.Bench(deadline)
        here = [cell for cell in cells if cell.library in matmul_cells.JAX]
        # XLA tries its own products on the GPU while it compiles, which the profiler counts too:
        # they wait for the others, and their measurements for all that compiles.
        ran = {cell: bench.what_runs(cell) for cell in here}
        dots = [cell for cell in here if ran[cell] in ("decoded", "xla", "dot")]
        kernels = [cell for cell in here if ran[cell] and cell not in dots]
        bench.compile(kernels)
        try:
            torch.wait(max(0, torch_deadline + TORCH_GRACE - time.time()))
        except subprocess.TimeoutExpired:
            torch.kill()
        print(f"PyTorch is done after {time.time() - start:.0f} s", flush=True)
        versions, rows = torch_rows(pathlib.Path(folder) / "torch.jsonl")
    about = machine(versions, args.commit)
    report = matmul_report.load(args.out)
    matmul_report.add(report, rows, about)
    matmul_report.save(report, args.out)
    for part in (*itertools.batched(kernels, SAVE_EVERY), *itertools.batched(dots, DOTS)):
        bench.compile(part)
        if part[0] in dots:
            bench.wait()
        rows = jax_rows(bench, part)
        matmul_report.add(report, rows, about)
        matmul_report.save(report, args.out)
        print(f"{len(rows)} cells after {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
