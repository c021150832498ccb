"""What a GPU does while something runs: power and memory by nvidia-smi, kernels by the profiler."""

import collections
import contextlib
import pathlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator

import jax

_QUERY = ["--query-gpu=power.draw,memory.used", "--format=csv,noheader,nounits"]


class Meter:
    """Samples of power (W) and memory (MiB) while it runs; empty where there is no nvidia-smi."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []
        self.seconds = 0.0

    @property
    def watts(self) -> float | None:
        """Mean power."""
        values = [watts for watts, _ in self.samples]
        return sum(values) / len(values) if values else None

    @property
    def peak_mib(self) -> float | None:
        """Most memory in use on the device."""
        return max((mib for _, mib in self.samples), default=None)


@contextlib.contextmanager
def metering() -> Iterator[Meter]:
    """Sample the first GPU every 50 ms."""
    meter = Meter()
    tool = shutil.which("nvidia-smi")
    process = None
    if tool:
        command = [tool, *_QUERY, "-i", "0", "-lms", "50"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    start = time.perf_counter()
    try:
        yield meter
    finally:
        meter.seconds = time.perf_counter() - start
        if process:
            process.terminate()
            for line in process.communicate()[0].splitlines():
                with contextlib.suppress(ValueError):  # the last line may be cut
                    watts, mib = map(float, line.split(","))
                    meter.samples.append((watts, mib))


def peak_gib() -> float | None:
    """Most bytes that JAX's allocator has held since the process began, in GiB."""
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return None if peak is None else round(peak / 2**30, 2)


def kernels(call: Callable[[], object]) -> list[tuple[str, float, int]]:
    """Return (name, microseconds, launches) of each kernel in a call, the most time first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        files = list(pathlib.Path(folder).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(files[0]))
        times: dict[str, float] = collections.defaultdict(float)
        counts: dict[str, int] = collections.defaultdict(int)
        for plane in data.planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                if "Stream" not in line.name:
                    continue
                for event in line.events:
                    stats = dict(event.stats)
                    op = stats.get("hlo_op") or stats.get("tf_op") or ""
                    name = f"{event.name} | {op}" if op else event.name
                    times[name] += event.duration_ns / 1e3
                    counts[name] += 1
    order = sorted(times, key=lambda name: -times[name])
    return [(name, round(times[name], 1), counts[name]) for name in order]


PARTS = {
    "attention": ("cudnn", "flash", "fmha"),
    "decode of weights": ("dequant",),
    "4-bit products": ("mosaic", "qmm", "matmul_decode", "matmul_mid", "matmul_large"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "dot", "splitk", "gemv"),
    "copies": ("memcpy", "memset", "copy", "dynamic-update-slice", "dynamic-slice"),
}


def breakdown(rows: list[tuple[str, float, int]]) -> dict[str, float]:
    """Return microseconds by part; what no part names is "elementwise"."""
    parts: dict[str, float] = collections.defaultdict(float)
    for name, microseconds, _ in rows:
        lowered = name.lower()
        hits = (part for part, words in PARTS.items() if any(w in lowered for w in words))
        parts[next(hits, "elementwise")] += microseconds
    return {part: round(us, 1) for part, us in sorted(parts.items(), key=lambda kv: -kv[1])}
