"""The README's Python blocks run in order, its files exist, and its numbers are measured ones."""

import json
import pathlib
import re

import numpy as np
import pytest

from qjax.core.codebook import codebook

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) >= 2


@pytest.mark.slow
def test_python_blocks_run(tmp_path, monkeypatch):
    """One after the other in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for number, block in enumerate(BLOCKS, 1):
        exec(compile(block, f"README.md block {number}", "exec"), namespace)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_map_names_what_exists():
    layout = README.split("## Layout")[1].split("\n## ")[0]
    named = re.findall(r"`([\w./]+(?:/|\.py))`", layout)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_versions_are_those_of_the_project():
    """The README's oldest versions are pyproject.toml's lower bounds."""
    project = (ROOT / "pyproject.toml").read_text()
    for name in ("jax", "flax", "optax", "orbax-checkpoint"):
        bound = re.search(rf'"{name}>=([\d.]+)"', project)
        assert bound is not None
        assert f"{name} {bound[1]}" in README


def table_rows(header: str) -> list[list[str]]:
    """The cells of the table under a header line."""
    lines = README.split(header)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_codebooks_are_those_of_the_code():
    codes, nf4, fp4 = zip(*table_rows("| Code | NF4 | FP4 |"), strict=True)
    assert list(map(int, codes)) == list(range(16))
    np.testing.assert_array_equal(np.array(nf4, np.float32), codebook("nf4"))
    np.testing.assert_array_equal(np.array(fp4, np.float32), codebook("fp4"))


def test_formats_are_the_measured_ones():
    rows = json.loads((ROOT / "benchmarks/results/formats.json").read_text())["rows"]
    numbers = [[f"{r['bits']:.2f}", f"{r['normal']:.4f}", f"{r['model']:.4f}"] for r in rows]
    names = [[r["format"], str(r["block"] or "row")] for r in rows]
    table = table_rows("| Format | Block | Bits a weight |")
    assert table == [[*name, *row] for name, row in zip(names, numbers, strict=True)]


def test_numbers_are_the_measured_ones():
    results = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())["milliseconds"]
    measured = [
        [f"{r['N']} x {r['K']}", str(r["M"]), *map(str, (r["qjax"], r["dequantize_then_dot"]))]
        for r in results
        if not r["transpose"]
    ]
    stated = table_rows("| W (out x in) |")
    assert stated
    assert [row[:4] for row in stated if row[:4] not in measured] == []


def test_gains_of_the_inits_are_the_measured_ones():
    results = json.loads((ROOT / "benchmarks/results/lora_init.json").read_text())
    assert f"({results['nf4_error']} of the weight)" in README
    measured: dict[str, list[str]] = {}
    for row in results["rows"]:
        measured.setdefault(row["init"], []).append(f"-{row['reduction_percent']} %")
    assert {row[0]: row[1:] for row in table_rows("| init | rank 8 |")} == measured


def test_the_two_gpu_table_is_what_was_measured():
    report = json.loads((ROOT / "benchmarks/results/nvidia-h200-x2.json").read_text())
    rows = {r["how"]: r for r in report["rows"] if "how" in r and not r["options"]}
    one = rows["one"]["tokens_per_s"]
    for how, label in [("one", "one GPU"), ("tensor", "tensor parallel"), ("fsdp", "FSDP")]:
        rate, memory = rows[how]["tokens_per_s"], rows[how]["device_gib"]
        share = "" if how == "one" else f" {rate / one:.2f}"
        assert f"| {label} | {rate:,} |{share} | {memory:.1f} GiB |" in README
    pairs = zip(*(rows[how]["losses"] for how in rows), strict=True)
    assert max(max(losses) - min(losses) for losses in pairs) < 0.00051
    training, memory, decode = report["offload"]["rows"]
    for text in (
        f"{memory['weights_gib']:.1f} GiB, on one H200 limited to {memory['limit_gib']:.0f} GiB",
        f"{training['tokens_per_s']} tokens/s (1 x 2048), one token in {decode['ms']:.0f} ms",
        f"the {decode['gigabytes_per_s']:.0f} GB/s of the bus",
        f"at most {memory['peak_gib']:.1f} GiB",
    ):
        assert text in README


def test_packed_caches_are_the_measured_ones():
    rows = json.loads((ROOT / "benchmarks/results/kv_cache.json").read_text())["rows"]
    measured = [
        [r["kv_format"], f"{r['bits']:.1f}", f"{r['bytes_per_token']:,}", f"{r['perplexity']:.3f}",
         f"{r['kl']:.5f}", f"{r['agreement']:.1%}"]
        for r in rows
    ]  # fmt: skip
    assert table_rows("| Cache | Bits a number |") == measured
