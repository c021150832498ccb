"""Write the README's tables of quality from the results: `python benchmarks/quality_readme.py`.

Those of `better_bits.py` and `qat.py`; each mean comes with the smallest and largest of the draws.
"""

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

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


def better_bits(report: Report) -> str:
    """Return the table of methods; one is better by a measure if it is in every draw."""
    rows = []
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


def qat(report: Report) -> str:
    """Return the table of draws."""
    keys = ("after", "after, by GPTQ", "aware")
    rows = [[str(row["seed"]), *(f"{row[key]:.5f}" for key in keys)] for row in report["rows"]]
    return table(
        ["draw", "float model, rounded", "float model, by GPTQ", "trained with rounding"], rows
    )


def section(name: str) -> str:
    """Return the lines between the marks of a table."""
    text = {"better_bits": better_bits, "qat": qat}[name](load(name))
    return f"<!-- {name}, by benchmarks/quality_readme.py -->\n\n{text}\n\n<!-- to here -->"


def main() -> None:
    text = README.read_text()
    for name in ("better_bits", "qat"):
        pattern = rf"<!-- {name}, by .*?<!-- to here -->"
        text = re.sub(pattern, lambda _, name=name: section(name), text, flags=re.DOTALL)
    README.write_text(text)


if __name__ == "__main__":
    main()
