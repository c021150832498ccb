"""The results file of the matmul benchmark, and what the README and NOTES quote of it.

`python benchmarks/matmul_report.py FILE` prints the tables.
"""

import json
import pathlib
import sys

from matmul_cells import MAIN, MODEL_CELLS, REFERENCE, ROWS

CELL = ("library", "k", "n", "m", "transpose", "double")
PEERS = ("bitsandbytes", "GemLite int4", "tinygemm int4", "XLA dequantize + dot")
EMPTY = {"method": "", "runs": {}, "matmul": []}


def load(path: pathlib.Path) -> dict:
    """The report in a file, or an empty one."""
    return json.loads(path.read_text()) if path.exists() else json.loads(json.dumps(EMPTY))


def key(row: dict) -> tuple:
    return tuple(row[field] for field in CELL)


def reference(row: dict) -> tuple:
    """The key of the cell that a row is compared with."""
    return REFERENCE, row["k"], row["n"], row["m"], row["transpose"], False


def add(report: dict, rows: list[dict], about: dict, method: str) -> None:
    """Put a run's rows in place of those of the same cells, compared with that run's reference."""
    run = f"{about['date']} {about['commit'][:7]}"
    report["method"] = method
    report["runs"][run] = about
    old = {key(row): row for row in report["matmul"]}
    old |= {key(row): row | {"run": run} for row in rows}
    for row in rows:
        row = old[key(row)]
        base = old.get(reference(row))
        row["us"] = round(row["us"], 2)
        row["error"] = float(f"{row['error']:.2g}")
        if base is not None and base["run"] == run:
            row["torch_bf16_us"] = round(base["us"], 2)
            row["ratio"] = round(base["us"] / row["us"], 2)
    report["matmul"] = [old[k] for k in sorted(old)]
    used = {row["run"] for row in report["matmul"]}
    report["runs"] = {name: about for name, about in report["runs"].items() if name in used}


def save(report: dict, path: pathlib.Path) -> None:
    """Write the report, one row a line."""
    parts = []
    for name, value in report.items():
        if isinstance(value, list):
            lines = ",\n".join("  " + json.dumps(row) for row in value)
            parts.append(f" {json.dumps(name)}: [\n{lines}\n ]")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def put(path: pathlib.Path, name: str, settings: dict, figures: dict) -> None:
    """Add a row of another measurement, in place of the one with the same settings."""
    report = load(path)
    kept = [row for row in report.get(name, []) if not settings.items() <= row.items()]
    save(report | {name: [*kept, settings | figures]}, path)


class Table:
    """The rows of a report, by cell."""

    def __init__(self, report: dict):
        self.rows = {key(row): row for row in report["matmul"]}

    def ratio(self, library, k, n, m, transpose=False, double=False) -> str:
        """How many times faster than torch bf16, or a dash."""
        value = self.rows.get((library, k, n, m, transpose, double), {}).get("ratio")
        return "-" if value is None else f"{value:.2f}"

    def us(self, library, k, n, m, transpose=False, double=False) -> str:
        value = self.rows.get((library, k, n, m, transpose, double), {}).get("us")
        return "-" if value is None else f"{value:.1f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def libraries_table(report: dict) -> str:
    """Every library on the first shape: torch bf16's and qjax's times, and ratios."""
    table, shape = Table(report), MAIN[0]
    head = ["rows of x", "torch bf16, us", "qjax, us", "qjax", *PEERS]
    rows = []
    for m in ROWS:
        times = [table.us(name, *shape, m) for name in (REFERENCE, "qjax")]
        rows.append([m, *times, *(table.ratio(name, *shape, m) for name in ("qjax", *PEERS))])
    return markdown(head, rows)


def shapes_table(report: dict) -> str:
    """qjax on each main shape, forward, double-quantized and backward."""
    table = Table(report)
    names = [f"{k} x {n}" for k, n in MAIN]
    head = ["rows of x", *names, *(f"{name}, dX" for name in names)]
    rows = [
        [m, *(table.ratio("qjax", *shape, m, back) for back in (False, True) for shape in MAIN)]
        for m in ROWS
    ]
    for m in (1, 16, 64):
        ratios = [table.ratio("qjax", *shape, m, double=True) for shape in MAIN]
        rows.append([f"{m}, double quantization", *ratios, *["-"] * len(MAIN)])
    return markdown(head, rows)


def models_table(report: dict) -> str:
    """The shapes of real models, the least ratio first."""
    table = Table(report)
    ratios = [(table.ratio("qjax", *cell), cell) for cell in MODEL_CELLS]
    measured = sorted((float(r), cell) for r, cell in ratios if r != "-")
    rows = [[f"{k} x {n}", m, table.us("qjax", k, n, m), r] for r, (k, n, m) in measured]
    return markdown(["K x N", "rows of x", "qjax, us", "ratio"], rows)


def main() -> None:
    report = load(pathlib.Path(sys.argv[1]))
    print(libraries_table(report), shapes_table(report), models_table(report), sep="\n\n")


if __name__ == "__main__":
    main()
