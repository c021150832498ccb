"""What the benchmarks rest on: their cells, their check of results, their file, their tables."""

import importlib
import json
import pathlib
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dequantize

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Import a script of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_the_list_of_model_shapes_has_forty_that_qjax_takes(module):
    cells = module("matmul_cells").MODEL_CELLS
    assert len(cells) == len(set(cells)) == 40
    assert all(k % 64 == 0 and 1 <= m <= 64 for k, n, m in cells)


def test_every_cell_has_its_reference(module):
    wanted = module("matmul_cells").wanted()
    assert len(wanted) == len(set(wanted))
    assert {cell.reference for cell in wanted} <= set(wanted)


@pytest.mark.parametrize("bytes_a_weight", [10**6, 2 * 10**7, 10**9])
def test_weights_in_turn_are_more_than_the_cache_holds(module, bytes_a_weight):
    count = module("matmul_cells").copies(bytes_a_weight)
    # 8 at most: small weights are measured with what a model has of them.
    assert count == 8 or (count * bytes_a_weight >= 140e6 and count >= 3)


@pytest.mark.parametrize("double", [False, True])
def test_the_hosts_weight_is_the_devices(module, double):
    script = module("matmul_jax")
    packed, scales, plain = script.quantized_weight(24, 128, double, 0)
    want = dequantize(
        *jax.tree.map(jnp.asarray, (packed, scales, script.CODEBOOK)),
        block_size=64,
        dtype=jnp.float32,
    )
    # Products of the same float32 numbers; the sum of double quantization may be fused.
    np.testing.assert_allclose(script.decode(packed, plain), want, rtol=1e-6)


@pytest.mark.parametrize("m", [3, 100])
@pytest.mark.parametrize("transpose", [False, True])
def test_the_check_sees_one_wrong_tile(module, m, transpose):
    script = module("matmul_jax")
    rng = np.random.default_rng(0)
    w = rng.standard_normal((192, 128), np.float32)
    x = rng.standard_normal((m, 192 if transpose else 128), np.float32).astype(jnp.bfloat16)
    y = x.astype(np.float32) @ (w if transpose else w.T)
    with ThreadPoolExecutor(1) as pool:
        decoded = pool.submit(lambda: w)
        assert script.relative_error(y, x, decoded, transpose) < 1e-6
        y[:3, 8:16] = 0
        assert script.relative_error(y, x, decoded, transpose) > 0.02


ABOUT = {"device": "GPU", "date": "2026-01-01", "commit": "0123456789", "versions": {}}


def row(library, us, m=1, **kinds):
    cell = {"library": library, "k": 4096, "n": 14336, "m": m, "transpose": False, "double": False}
    return cell | kinds | {"us": us, "error": 0.00212345}


def test_rows_are_compared_with_the_reference_of_their_run(module, tmp_path):
    report_module = module("matmul_report")
    report, file = report_module.load(tmp_path / "none.json"), tmp_path / "results.json"
    report_module.add(report, [row("torch bf16", 40.0), row("qjax", 16.0)], ABOUT)
    report_module.add(report, [row("qjax", 14.0, double=True)], ABOUT)
    later = ABOUT | {"date": "2026-01-02"}
    report_module.add(report, [row("bitsandbytes", 20.0)], later)
    report_module.save(report, file)
    assert report_module.load(file) == report == json.loads(file.read_text())
    table = report_module.Table(report)
    assert table.ratio("qjax", 4096, 14336, 1) == "2.50"
    assert table.ratio("qjax", 4096, 14336, 1, double=True) == "2.86"
    assert table.ratio("bitsandbytes", 4096, 14336, 1) == "-"  # another run than its reference's
    assert table.us("bitsandbytes", 4096, 14336, 1) == "20.0"
    # A run whose rows are all replaced is forgotten.
    everything = [row("torch bf16", 42.0), row("qjax", 14.0), row("qjax", 13.0, double=True)]
    report_module.add(report, everything, later)
    assert list(report["runs"]) == ["2026-01-02 0123456"]
    assert report_module.Table(report).ratio("qjax", 4096, 14336, 1) == "3.00"


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_a_wrong_result_is_not_compared(module, error):
    report_module = module("matmul_report")
    report = report_module.load(pathlib.Path("none.json"))
    wrong = row("qjax", 16.0) | {"error": error}
    report_module.add(report, [row("torch bf16", 40.0), wrong], ABOUT)
    [found] = [row for row in report["matmul"] if row["library"] == "qjax"]
    assert found["wrong"] and "ratio" not in found


def test_other_measurements_replace_those_of_the_same_settings(module, tmp_path):
    report_module, file = module("matmul_report"), tmp_path / "results.json"
    for us in (3.0, 2.0):
        report_module.put(file, "chain", {"m": 1, "pairs": 2}, {"us": us})
    report_module.put(file, "chain", {"m": 4, "pairs": 2}, {"us": 5.0})
    rows = report_module.load(file)["chain"]
    assert rows == [{"m": 1, "pairs": 2, "us": 2.0}, {"m": 4, "pairs": 2, "us": 5.0}]


def test_the_readme_quotes_the_file(module):
    report = module("matmul_report").load(FOLDER / "results/nvidia-h100.json")
    assert module("matmul_readme").section(report) in (FOLDER.parent / "README.md").read_text()


def test_the_limit_is_bytes_for_one_row_and_operations_for_many(module):
    limit = module("matmul_plot").limit
    # 2 bytes a weight over 0.5625, and x and y of 0.03 % of them.
    assert limit(4096, 14336, 1) == pytest.approx(3.556, rel=1e-3)
    assert limit(4096, 14336, 8192) == 1


@pytest.mark.parametrize("name", ["summary", "better_bits", "qat", "training", "generation"])
def test_the_readme_quotes_the_other_files(name, module):
    section = module("readme_tables").section(name)
    assert section in (FOLDER.parent / "README.md").read_text()


def test_a_method_is_better_if_every_draw_is(module, monkeypatch):
    def rows(key, plain, draws, **kinds):
        first = {"method": "plain", "seed": None, key: plain} | kinds
        return [first, *({"method": "awq", "seed": i, key: v} | kinds for i, v in enumerate(draws))]

    report = {
        "smollm2": {"rows": rows("perplexity", 20.0, [18.0, 19.0], kl=0.5, float=15.0)},
        "minilm": {"rows": rows("1 - cosine", 0.04, [0.03, 0.05])},
    }
    for row, kl in zip(report["smollm2"]["rows"], (0.5, 0.3, 0.2), strict=True):
        row["kl"] = kl
    tables = module("readme_tables")
    monkeypatch.setattr(tables, "load", lambda name: report)
    table = tables.better_bits().splitlines()
    assert table[2] == "| plain | 20.00 | 0.500 | 0.0400 |  |"
    line = "| awq | 18.50 (18.00 to 19.00) | 0.250 (0.200 to 0.300) | 0.0400 (0.0300 to 0.0500) "
    assert table[3] == line + "| not in cosine |"
