"""What the README quotes of the matmul benchmark.

`python benchmarks/matmul_readme.py RESULTS.json` prints it; with README.md as a second argument it
writes it there, between the two marks.
"""

import pathlib
import sys
import textwrap

import matmul_report
from matmul_cells import MAIN, MODEL_CELLS, REFERENCE, ROWS

BEGIN, END = "<!-- by benchmarks/matmul_readme.py -->", "<!-- to here -->"
PEERS = ("bitsandbytes", "GemLite int4", "tinygemm int4", "XLA dequantize + dot")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def libraries_table(report: dict) -> str:
    """Every library on the first shape: torch bf16's and qjax's times, and ratios."""
    table, shape = matmul_report.Table(report), MAIN[0]
    head = ["rows of x", "torch bf16, us", "qjax, us", "qjax", *PEERS]
    rows = []
    for m in ROWS:
        times = [table.us(name, *shape, m) for name in (REFERENCE, "qjax")]
        rows.append([m, *times, *(table.ratio(name, *shape, m) for name in ("qjax", *PEERS))])
    return markdown(head, rows)


def shapes_table(report: dict) -> str:
    """qjax on each main shape, forward, double-quantized and backward."""
    table = matmul_report.Table(report)
    names = [f"{k} x {n}" for k, n in MAIN]
    head = ["rows of x", *names, *(f"{name}, dX" for name in names)]
    rows = [
        [m, *(table.ratio("qjax", *shape, m, back) for back in (False, True) for shape in MAIN)]
        for m in ROWS
    ]
    for m in (1, 16, 64):
        ratios = [table.ratio("qjax", *shape, m, double=True) for shape in MAIN]
        rows.append([f"{m}, double quantization", *ratios, *["-"] * len(MAIN)])
    return markdown(head, [row for row in rows if {*row[1:]} != {"-"}])


def models_table(report: dict) -> str:
    """The shapes of real models, the least ratio first."""
    rows = [[f"{r['k']} x {r['n']}", r["m"], r["us"], r["ratio"]] for r in model_rows(report)]
    return markdown(["K x N", "rows of x", "qjax, us", "ratio"], rows)


def chain_table(report: dict) -> str:
    """Wall times of dependent layers."""
    ways = "default", "graph"
    head = ["K x N and back", "rows of x", "between", "us", "ratio", "us, CUDA graphs", "ratio"]
    rows = []
    for row in sorted(report["chain"], key=lambda r: (-r["n"], r["m"], r["between"])):
        figures = (row[name] for way in ways for name in (f"nf4_{way}_us", f"{way}_ratio"))
        rows.append([f"{row['k']} x {row['n']}", row["m"], row["between"], *figures])
    return markdown(head, rows)


def model_rows(report: dict) -> list[dict]:
    """The measured cells of real models, the least ratio first."""
    rows = [
        matmul_report.Table(report).rows.get(("qjax", *cell, False, False), {})
        for cell in MODEL_CELLS
    ]
    return sorted((row for row in rows if "ratio" in row), key=lambda row: row["ratio"])


def summary(report: dict) -> list[str]:
    """What was measured beside single products, a sentence each."""
    found = []
    if models := model_rows(report):
        worst, middle = models[0], models[len(models) // 2]
        found.append(
            f"Over {len(models)} shapes of Llama, Mistral, Qwen3 and gpt-oss layers, with 1 to 64 "
            f"rows, the median is {middle['ratio']:.2f}, the worst {worst['ratio']:.2f} "
            f"({worst['k']} x {worst['n']}, {worst['m']} rows)."
        )
    for row in report.get("decode_step", []):
        graph = ", CUDA graphs" if row["graph"] else ""
        found.append(
            f"A decode step of {row['layers']} layers of the 7B shape, batch {row['batch']}{graph}:"
            f" {row['ms_a_token']} ms a token, {row['tokens_a_second']:.0f} tokens/s."
        )
    return found


def section(report: dict) -> str:
    """The README's part on GPUs."""
    runs = list(report["runs"].values())
    devices = " and ".join(sorted({run["device"] for run in runs}))
    first = f"K x N = {MAIN[0][0]} x {MAIN[0][1]}"
    intro = (
        f"On one {devices}: how many times as fast as PyTorch's bf16 product one with 4-bit "
        f"weights in blocks of 64 is, {first}, with weights that no cache holds. qjax, "
        "bitsandbytes and XLA multiply by NF4, GemLite and tinygemm by integers with bf16 scales "
        f"and zeros. [nvidia-h100.json](benchmarks/results/nvidia-h100.json) has the details of "
        f"{'; '.join(run['what'] for run in runs)}."
    )
    tables = libraries_table(report), shapes_table(report)
    parts = [
        textwrap.fill(intro, 100),
        "![Times as fast as bf16, by rows of x](benchmarks/results/nvidia-h100.svg)",
        tables[0],
        "qjax, by shape (K x N), forward and for the gradient of x (dX):",
        tables[1],
    ]
    if any("*" in table for table in tables):
        parts.append(f"\\* To another reference than PyTorch in the same run:\n{others(report)}.")
    found = [textwrap.fill(f"- {line}", 100, subsequent_indent="  ") for line in summary(report)]
    parts.append("\n".join(found))
    if "chain" in report:
        intro = (
            "A chain of 64 products, each of the result of the one before it, with nothing or SiLU "
            "between them: wall time of a product, and how many times as fast as JAX's bf16."
        )
        parts += [textwrap.fill(intro, 100), chain_table(report)]
    return "\n\n".join(parts)


def others(report: dict) -> str:
    """The references that are not PyTorch's bf16 of the same run."""
    names = {row.get("reference", REFERENCE) for row in report["matmul"]} - {REFERENCE}
    return "; ".join(sorted(names))


def main() -> None:
    report = matmul_report.load(pathlib.Path(sys.argv[1]))
    if len(sys.argv) == 2:
        print(section(report), models_table(report), sep="\n\n")
        return
    readme = pathlib.Path(sys.argv[2])
    before, _, after = readme.read_text().partition(BEGIN)
    after = after.partition(END)[2]
    readme.write_text("\n\n".join([before + BEGIN, section(report), END + after]))


if __name__ == "__main__":
    main()
