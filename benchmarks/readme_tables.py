"""Write the README's tables from the results: `python benchmarks/readme_tables.py`.

The summary, the tables of whole models, and those of `better_bits.py` and `qat.py`, whose means
come with the smallest and largest of the draws. `matmul_readme.py` writes those of products.
"""

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

import matmul_report
from matmul_cells import MAIN

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
Report = dict[str, Any]


def load(name: str) -> Report:
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: list[float], digits: int) -> str:
    """Return the mean, and the range if there is more than one value."""
    text = f"{mean(values):.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


# Model, key, digits, and what a reader calls it.
COLUMNS = (
    ("smollm2", "perplexity", 2, "perplexity"),
    ("smollm2", "kl", 3, "KL"),
    ("minilm", "1 - cosine", 4, "cosine"),
)


def better_bits() -> str:
    """Return the table of methods; one is better by a measure if it is in every draw."""
    report, rows = load("better_bits"), []
    for method in dict.fromkeys(row["method"] for row in report["minilm"]["rows"]):
        line, lost = [method], []
        for model, key, digits, name in COLUMNS:
            every = report[model]["rows"]
            found = [row[key] for row in every if row["method"] == method]
            line.append(spread(found, digits))
            if max(found) >= every[0][key]:  # of plain NF4
                lost.append(name)
        verdict = f"not in {', '.join(lost)}" if lost else "yes"
        rows.append([*line, "" if method == "plain" else verdict])
    plain = report["smollm2"]["rows"][0]["float"]
    header = ["method", f"SmolLM2, perplexity ({plain:.2f} in float)", "SmolLM2, KL"]
    return table([*header, "MiniLM, 1 - cosine", "better than plain NF4"], rows)


def qat() -> str:
    """Return the table of draws."""
    keys = ("after", "after, by GPTQ", "aware")
    rows = [[str(row["seed"]), *(f"{row[key]:.5f}" for key in keys)] for row in load("qat")["rows"]]
    return table(
        ["draw", "float model, rounded", "float model, by GPTQ", "trained with rounding"], rows
    )


PEER = "transformers + bitsandbytes + PEFT"


def measured(file: str, case: str, key: str, digits: int = 0) -> str:
    """Return one figure of a case of whole models."""
    row = next(row for row in load(file)["rows"] if row["case"] == case)
    return f"{row[key]:,.{digits}f}"


def summary() -> str:
    """Return the figures that a newcomer asks for first, beside those of the peers."""
    products = matmul_report.Table(load("nvidia-h100"))
    libraries = ("qjax", "bitsandbytes", "XLA dequantize + dot")
    rows = [
        [name, *(products.ratio(library, *MAIN[0], m) for library in libraries)]
        for name, m in [
            ("product, 1 row of x, times as fast as bf16", 1),
            ("product, 16 rows", 16),
            ("product, 64 rows", 64),
        ]
    ]
    step = "llama-2-7b/nf4/4x2048"
    for name, key, digits in [
        ("QLoRA step, 4 x 2048 tokens, tokens/s", "tokens_per_s", 0),
        ("its memory, GiB", "peak_gib", 1),
    ]:
        figures = (measured(file, step, key, digits) for file in ("finetune", "peer"))
        rows.append([name, *figures, ""])
    ours = measured("decode", "llama-2-7b/nf4/on/1x64+192", "tokens_per_s")
    theirs = measured("peer", "llama-2-7b/nf4/on/1x64+32", "tokens_per_s", 1)
    rows.append(["generation with adapters, batch 1, tokens/s", ours, theirs, ""])
    peer = "bitsandbytes, with transformers and PEFT"
    return table(["", "qjax", peer, "decoded and multiplied by XLA"], rows)


def training() -> str:
    """Return the table of QLoRA steps."""
    rows = []
    for name, file, case in [
        ("7B, 4 x 2048 tokens", "finetune", "llama-2-7b/nf4/4x2048"),
        ("7B, 8 x 2048", "finetune", "llama-2-7b/nf4/8x2048"),
        ("8B, 4 x 2048", "finetune", "llama-3-8b/nf4/4x2048"),
        ("70B, 1 x 2048", "finetune", "llama-3-70b/nf4/1x2048"),
        (f"7B, 4 x 2048, {PEER}", "peer", "llama-2-7b/nf4/4x2048"),
    ]:
        speed, peak = measured(file, case, "tokens_per_s"), measured(file, case, "peak_gib", 1)
        rows.append([name, speed, peak])
    return table(["QLoRA step", "tokens/s", "peak, GiB"], rows)


def generation() -> str:
    """Return the table of generation, without adapters and with them."""
    rows = []
    for name, model, size in [
        ("7B, batch 1", "llama-2-7b", "1x64+192"),
        ("7B, batch 32", "llama-2-7b", "32x64+192"),
        ("70B, batch 1", "llama-3-70b", "1x64+64"),
        ("7B, batch 1, not fused", "llama-2-7b", "1x64+192/unfused"),
    ]:
        cases = (f"{model}/nf4/{adapters}/{size}" for adapters in ("off", "on"))
        rows.append([name, *(measured("decode", case, "tokens_per_s") for case in cases)])
    theirs = measured("peer", "llama-2-7b/nf4/on/1x64+32", "tokens_per_s", 1)
    rows.append([f"7B, batch 1, {PEER}, 32 new tokens", "", theirs])
    return table(["generation, whole calls", "tokens/s", "with adapters"], rows)


TABLES = {f.__name__: f for f in (summary, better_bits, qat, training, generation)}


def section(name: str) -> str:
    """Return the lines between the marks of a table."""
    mark = f"<!-- {name}, by benchmarks/readme_tables.py -->"
    return f"{mark}\n\n{TABLES[name]()}\n\n<!-- to here -->"


def main() -> None:
    text = README.read_text()
    for name in TABLES:
        pattern = rf"<!-- {name}, by .*?<!-- to here -->"
        text = re.sub(pattern, lambda _, name=name: section(name), text, flags=re.DOTALL)
    README.write_text(text)


if __name__ == "__main__":
    main()
