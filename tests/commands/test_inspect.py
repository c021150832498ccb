"""`qjax inspect` shows what is in a file, as other readers of the file count it."""

import re

import gguf
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

import qjax
import qjax.cli
from tests.hf.gguf_files import write_model
from tests.models.golden import FOLDER, write_bnb


def run(path):
    return CliRunner().invoke(qjax.cli.app, ["inspect", str(path)])


def parameters(family):
    tensors = load_file(FOLDER / family / "hf" / "model.safetensors")
    return sum(value.size for value in tensors.values())


def test_a_float_checkpoint():
    result = run(FOLDER / "gpt2" / "hf")
    assert result.exit_code == 0, result.output
    assert "gpt2, float32" in result.output
    assert f"{parameters('gpt2'):,} parameters in" in result.output


def test_a_bitsandbytes_checkpoint_is_counted_without_reading_its_weights(tmp_path, monkeypatch):
    folder = write_bnb("llama", tmp_path)
    monkeypatch.setattr("qjax.hf.safetensors.read_qtensor", None)  # would fail if called
    result = run(folder)
    assert result.exit_code == 0, result.output
    assert "llama, 4-bit (bitsandbytes)" in result.output
    packed = load_file(FOLDER / "llama" / "bnb" / "quantized.safetensors")
    # Tables and quant_states are not of the weights; the offset is 4 bytes in the quant_state.
    stored = {n: v for n, v in packed.items() if not re.search("quant_map|quant_state", n)}
    size = sum(v.nbytes for v in stored.values()) + 4 * sum("nested_" in n for n in stored)
    assert f"in 4-bit weights of 4.143 bits: {size / 1e3:.4g} kB" in result.output


def test_a_checkpoint_of_save(tmp_path):
    model = qjax.from_pretrained(FOLDER / "llama" / "hf", config=qjax.QuantConfig())
    qjax.save(tmp_path / "saved", model)
    result = run(tmp_path / "saved")
    assert result.exit_code == 0, result.output
    assert "a checkpoint of qjax.save" in result.output
    assert f"{parameters('llama'):,} parameters in" in result.output
    assert re.search(r"layers/1/mlp/up_proj/kernel +\[64, 64\] +nf4 +64 dq", result.output)


def test_a_gguf_file(tmp_path):
    write_model(tmp_path / "model.gguf", "llama", gguf.GGMLQuantizationType.Q8_0)
    result = run(tmp_path / "model.gguf")
    assert result.exit_code == 0, result.output
    # Blocks of 32 bytes and a float16 scale: 8.5 bits.
    assert re.search(r"blk.1.ffn_up.weight +\[64, 64\] +Q8_0 +8.500 +4,352", result.output)
    assert f"{parameters('llama'):,} parameters in" in result.output


@pytest.mark.parametrize("content", [None, {}, {"config.json": "{"}, {"model.gguf": "GGUF"}])
def test_what_is_no_checkpoint_is_one_line(content, tmp_path):
    path = tmp_path / "model"
    if content is not None:
        path.mkdir()
        for name, text in content.items():
            (path / name).write_text(text)
            path = path / name if name.endswith(".gguf") else path
    result = run(path)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ") and result.output.count("\n") == 1
