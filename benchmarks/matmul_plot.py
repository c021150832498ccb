"""Plot the matmul benchmark: `python benchmarks/matmul_plot.py RESULTS.json PLOT.svg`.

How many times faster than torch bf16 each library is, by rows of x, one panel for each main shape;
and the limit: the bytes that must move at 3.0 TB/s or the operations at 800 TFLOP/s, whichever
takes longer, of bf16 over those of NF4 with float32 scales.
"""

import pathlib
import sys

import matmul_report
import matplotlib
from matmul_cells import BLOCK, MAIN, ROWS
from matmul_readme import PEERS

matplotlib.use("svg")
from matplotlib import pyplot

BANDWIDTH, OPERATIONS = 3.0e12, 800e12  # measured copies, and dense products, of an H100 (SXM)
LIBRARIES = ("qjax", *PEERS)


def limit(k: int, n: int, m: int) -> float:
    """The largest ratio that bytes and operations allow."""

    def seconds(bytes_a_weight: float) -> float:
        moved = n * k * bytes_a_weight + 2 * m * (n + k)
        return max(moved / BANDWIDTH, 2 * m * n * k / OPERATIONS)

    return seconds(2) / seconds(0.5 + 4 / BLOCK)


def draw(report: dict, path: pathlib.Path) -> None:
    table = matmul_report.Table(report)
    matplotlib.rcParams["svg.hashsalt"] = "qjax"  # the same file from the same numbers
    figure, panels = pyplot.subplots(1, len(MAIN), figsize=(12, 4), sharey=True)
    for panel, (k, n) in zip(panels, MAIN, strict=True):
        limits = [limit(k, n, m) for m in ROWS]
        panel.plot(ROWS, limits, color="black", linestyle=":", label="limit")
        for i, library in enumerate(LIBRARIES):
            cells = [table.rows.get((library, k, n, m, False, False), {}) for m in ROWS]
            measured = [(row["m"], row["ratio"]) for row in cells if "ratio" in row]
            if measured:
                width = 2.5 if library == "qjax" else 1.2
                style = {"color": f"C{i}", "linewidth": width, "label": library}
                panel.plot(*zip(*measured), marker=".", **style)
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_xticks(ROWS[::3], ROWS[::3])
        panel.set_title(f"{k} x {n}")
        panel.set_xlabel("rows of x")
    panels[0].set_ylabel("times as fast as bf16")
    panels[-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(matmul_report.load(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]))
