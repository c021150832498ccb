"""The results file of the matmul benchmark: rows of cells, of the runs that they were taken in."""

import json
import pathlib

from matmul_cells import REFERENCE

CELL = ("library", "k", "n", "m", "transpose", "double")
TOLERANCE = 2.0**-5  # of the 2-norm; roundings add up to 2^-8, partial sums in bf16 to 2^-6
EMPTY = {"runs": {}, "matmul": []}


def load(path: pathlib.Path) -> dict:
    """The report in a file, or an empty one."""
    return json.loads(path.read_text()) if path.exists() else json.loads(json.dumps(EMPTY))


def key(row: dict) -> tuple:
    return tuple(row[field] for field in CELL)


def reference(row: dict) -> tuple:
    """The key of the cell that a row is compared with."""
    return REFERENCE, row["k"], row["n"], row["m"], row["transpose"], False


def add(report: dict, rows: list[dict], about: dict) -> None:
    """Put a run's rows in place of those of the same cells, compared with that run's reference."""
    run = f"{about['date']} {about['commit'][:7]}"
    report["runs"][run] = about
    old = {key(row): row for row in report["matmul"]}
    old |= {key(row): row | {"run": run} for row in rows}
    for row in rows:
        row = old[key(row)]
        base = old.get(reference(row))
        row["us"] = round(row["us"], 2)
        row["error"] = float(f"{row['error']:.2g}")
        if not row["error"] <= TOLERANCE:
            row["wrong"] = True  # and not compared
        elif base is not None and base["run"] == run:
            compare(row, REFERENCE, base["us"])
    report["matmul"] = [old[k] for k in sorted(old)]
    used = {row["run"] for row in report["matmul"]}
    report["runs"] = {name: about for name, about in report["runs"].items() if name in used}


def compare(row: dict, name: str, us: float) -> None:
    """Say how many times as fast a row is as a reference of this name and time."""
    row |= {"reference": name, "reference_us": round(us, 2), "ratio": round(us / row["us"], 2)}


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
        """How many times as fast as bf16, or a dash; starred if not torch's of the same run."""
        row = self.rows.get((library, k, n, m, transpose, double), {})
        star = "" if row.get("reference") == REFERENCE else "\\*"
        return f"{row['ratio']:.2f}{star}" if "ratio" in row else "-"

    def us(self, library, k, n, m, transpose=False, double=False) -> str:
        value = self.rows.get((library, k, n, m, transpose, double), {}).get("us")
        return "-" if value is None else f"{value:.1f}"
