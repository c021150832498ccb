"""`qjax quantize` writes what the library loads and transformers' logits ask for."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import qjax.cli
from tests.models.golden import FOLDER, TOLERANCE, error, reference, write_bnb


def run(*args):
    return CliRunner().invoke(qjax.cli.app, ["quantize", *map(str, args)])


def test_a_folder_is_quantized_with_its_tokenizer(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for file in (FOLDER / "llama" / "hf").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer_config.json").write_text("{}")
    (source / "README.md").write_text("")
    result = run(source, target, "--no-double-quant", "--compute-dtype", "float32")
    assert result.exit_code == 0, result.output
    # 16,384 embedding and head, 320 norms, 49,152 packed; the golden config's count.
    assert "65,856 parameters in 0.1 MB, 36% of the original" in result.output
    assert sorted(file.name for file in target.iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]
    model, ref = qjax.from_pretrained(target), reference("llama")
    assert error(model(ref["input_ids"][:1]), ref["logits_nf4_nodq"]).max() < TOLERANCE


def test_the_options_reach_the_file(tmp_path):
    options = ("--format", "fp4", "--block-size", "32", "--exclude", "mlp", "--dtype", "bfloat16")
    result = run(FOLDER / "llama" / "hf", tmp_path / "out", *options, "--include", "layers/1")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "fp4"
    assert config["dtype"] == "bfloat16"
    model = qjax.from_pretrained(tmp_path / "out")
    packed = {row.path: row.block_size for row in qjax.report(model).rows if row.is_quantized}
    assert packed == {f"layers/1/self_attn/{p}_proj/kernel": 32 for p in "kqvo"}
    assert model.norm.scale.dtype == "bfloat16"


@pytest.mark.parametrize(
    "source, options, message",
    [
        ("nothing", (), r"path_or_id='nothing' is no model folder, .gguf file or hub id"),
        (FOLDER / "llama" / "hf", ("--block-size", "48"), "block_size"),
        (FOLDER / "llama" / "hf", ("--include", "no_such"), "include='no_such' matches no"),
    ],
)
def test_an_error_is_one_line_and_nothing_is_written(source, options, message, tmp_path):
    result = run(source, tmp_path / "out", *options)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ") and message in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_in_the_way_is_kept_unless_asked(tmp_path):
    write_bnb("gpt2", tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    result = run(FOLDER / "llama" / "hf", tmp_path)
    assert result.exit_code == 1 and "choose another, or --overwrite" in result.output
    assert run(tmp_path, tmp_path, "--overwrite").exit_code == 1  # it would read what it replaces
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert run(FOLDER / "llama" / "hf", tmp_path, "--overwrite").exit_code == 0
    assert np.any(qjax.from_pretrained(tmp_path).norm.scale[...])


def test_help_says_what_the_arguments_are():
    result = run("--help")
    assert result.exit_code == 0
    for word in ("SRC", "DST", "--format", "--block-size", "tokenizer", "qjax inspect"):
        assert word in result.output
