"""The PyTorch side of the matmul benchmark: bf16, bitsandbytes, GemLite and tinygemm.

`python benchmarks/matmul_torch.py CELLS OUT DEADLINE` measures the cells of a JSON list, in order,
until the deadline (seconds since the epoch), and appends one JSON row a line to OUT. It runs in a
process of its own, since two profilers do not share one.
"""

import contextlib
import functools
import importlib.metadata
import itertools
import json
import pathlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from matmul_cells import BLOCK, Cell, copies

REPEATS = 5
BATCH = 14  # cells of one profile, of one library
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKAGES = ("torch", "bitsandbytes", "gemlite", "triton")


class Library(NamedTuple):
    """How a library multiplies by each of its weights, and the last one in float."""

    count: int
    decoded: torch.Tensor
    forward: Callable  # (x, i) -> x @ W_i.T
    backward: Callable | None = None  # (dy, i) -> dy @ W_i; None: as autograd does


def random_weight(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) * 0.02


def random_codes(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """4-bit codes [n, k] and bf16 scales and zeros [n, k // BLOCK], of w = (code - zero) scale."""
    codes = torch.randint(0, 16, (n, k), device=DEVICE, dtype=torch.uint8)
    blocks = (n, k // BLOCK)
    scales = torch.rand(blocks, device=DEVICE, dtype=torch.bfloat16) * 0.01 + 0.002
    return codes, scales, torch.full_like(scales, 8)


def decode(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    n, k = codes.shape
    blocks = (codes.float() - 8).reshape(n, -1, BLOCK) * scales.float()[..., None]
    return blocks.reshape(n, k)


def bf16(n: int, k: int) -> Library:
    ws = [random_weight(n, k) for _ in range(copies(2 * n * k))]
    return Library(len(ws), ws[-1], lambda x, i: x @ ws[i].T, lambda dy, i: dy @ ws[i])


def bitsandbytes(n: int, k: int, double: bool = False) -> Library:
    import bitsandbytes as bnb

    quantize = functools.partial(
        bnb.functional.quantize_4bit, blocksize=BLOCK, quant_type="nf4", compress_statistics=double
    )
    ws = [quantize(random_weight(n, k)) for _ in range(copies(n * k * 9 // 16))]

    def forward(x, i):
        packed, state = ws[i]
        return bnb.matmul_4bit(x, packed.t(), quant_state=state)

    return Library(len(ws), bnb.functional.dequantize_4bit(*ws[-1]), forward)


def tinygemm(n: int, k: int) -> Library:
    ws = []
    for _ in range(copies(n * k * 9 // 16)):
        codes, scales, _ = random_codes(n, k)
        pairs = codes[:, ::2] << 4 | codes[:, 1::2]
        packed = torch._convert_weight_to_int4pack(pairs, 8)
        # Its w is (code - 8) scale + zero.
        zeros = torch.zeros_like(scales)
        ws.append((packed, torch.stack([scales.T, zeros.T], -1).contiguous()))

    def forward(x, i):
        return torch._weight_int4pack_mm(x, ws[i][0], BLOCK, ws[i][1])

    return Library(len(ws), decode(codes, scales), forward)


def gemlite(n: int, k: int) -> Library:
    from gemlite.helper import A16W4_HQQ_INT

    ws = []
    for _ in range(copies(n * k * 9 // 16)):
        codes, scales, zeros = random_codes(n, k)
        make = A16W4_HQQ_INT(device=DEVICE, dtype=torch.bfloat16)
        ws.append(make.from_weights(codes, scales, zeros))
    return Library(len(ws), decode(codes, scales), lambda x, i: ws[i](x))


LIBRARIES = {
    "torch bf16": bf16,
    "bitsandbytes": bitsandbytes,
    "tinygemm int4": tinygemm,
    "GemLite int4": gemlite,
}


@functools.lru_cache(maxsize=2)
def load(library: str, n: int, k: int) -> Library:
    return LIBRARIES[library](n, k)


def prepare(cell: Cell) -> tuple[list[Callable], float]:
    """The products of a cell, and the relative error of the last one."""
    library = load(cell.library, cell.n, cell.k)
    width = cell.n if cell.transpose else cell.k
    xs = [
        torch.randn(cell.m, width, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(library.count)
    ]
    w = library.decoded.float()
    want = xs[-1].float() @ (w if cell.transpose else w.T)
    if not cell.transpose:
        runs = [functools.partial(library.forward, x, i) for i, x in enumerate(xs)]
    elif library.backward:
        runs = [functools.partial(library.backward, dy, i) for i, dy in enumerate(xs)]
    else:
        runs = [autograd(library.forward, dy, i, cell.k) for i, dy in enumerate(xs)]
    error = torch.linalg.norm(runs[-1]().float() - want) / torch.linalg.norm(want)
    return runs, float(error)


def autograd(forward: Callable, dy: torch.Tensor, i: int, k: int) -> Callable:
    """The gradient by x, through the library's own autograd."""
    x = torch.randn(len(dy), k, device=DEVICE, dtype=dy.dtype, requires_grad=True)
    y = forward(x, i)
    return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)[0]


def mark() -> None:
    """A kernel that separates the repetitions in the profile."""
    if DEVICE == "cuda":
        torch.cuda._sleep(1)


def record(batch: list[Cell]) -> list[dict]:
    """Measure cells in one profile; their kernels lie between marks."""
    activity = torch.profiler.ProfilerActivity
    kind = activity.CUDA if DEVICE == "cuda" else activity.CPU
    rows = []
    with torch.profiler.profile(activities=[kind]) as profile:
        for cell in batch:
            try:
                runs, error = prepare(cell)
            except Exception as problem:  # one cell's failure must not lose the others
                print(f"{cell}: {type(problem).__name__}: {str(problem)[:300]}", file=sys.stderr)
                continue
            mark()
            for _ in range(REPEATS):
                for run in runs:
                    run()
                mark()
            rows.append({"cell": cell, "error": error, "count": len(runs)})
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    if DEVICE == "cuda":
        parts = split(kernels(profile))
    else:  # to try the script
        parts = [1.0] * (len(rows) * (REPEATS + 1) + 1)
    if len(parts) != len(rows) * (REPEATS + 1) + 1:
        raise RuntimeError(f"the profile has {len(parts)} parts for {len(rows)} cells")
    for i, row in enumerate(rows):
        # The part before a cell's first mark is its preparation.
        first = i * (REPEATS + 1) + 1
        row["us"] = statistics.median(parts[first : first + REPEATS]) / row.pop("count")
    return rows


def kernels(profile) -> list[tuple[str, float]]:
    """(name, microseconds) of what ran on the device, in order."""
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    return [(e.name, e.time_range.elapsed_us()) for e in events]


def split(events: list[tuple[str, float]]) -> list[float]:
    """The sum of each run of kernels that a mark ends."""
    sums = [0.0]
    for name, us in events:
        if "spin_kernel" in name:
            sums.append(0.0)
        else:
            sums[-1] += us
    return sums


def batches(cells: list[Cell]) -> Iterator[list[Cell]]:
    """Cells in a row of one library, at most BATCH; few where each compiles kernels of its own."""
    for library, group in itertools.groupby(cells, key=lambda cell: cell.library):
        yield from map(list, itertools.batched(group, 2 if library == "GemLite int4" else BATCH))


def versions() -> dict[str, str]:
    """Those of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def main() -> None:
    start = time.time()
    warnings.simplefilter("ignore")
    torch.backends.cuda.matmul.allow_tf32 = False
    cells_path, out, deadline = sys.argv[1:]
    cells = [Cell(**cell) for cell in json.loads(pathlib.Path(cells_path).read_text())]
    with open(out, "a") as file:
        print(json.dumps({"versions": versions()}), file=file, flush=True)
        for batch in batches(cells):
            if time.time() > float(deadline):
                break
            try:
                rows = record(batch)
            except RuntimeError as error:  # one profile's failure must not lose the others
                print(f"{batch[0]} and after: {error}", file=sys.stderr)
                continue
            for row in rows:
                print(json.dumps(row.pop("cell").__dict__ | row), file=file, flush=True)
            print(f"{time.time() - start:.0f} s: {batch[-1]} and before", flush=True)


if __name__ == "__main__":
    main()
