"""GGUF files written by the gguf package give transformers' logits."""

import builtins

import gguf
import numpy as np
import pytest

import qjax.hf
from tests.hf.gguf_files import write_llama
from tests.models.golden import FOLDER, LLAMAS, TOLERANCE, golden_model, reference

F32 = gguf.GGMLQuantizationType.F32


@pytest.mark.parametrize("family", LLAMAS)
def test_a_float_file_gives_transformers_logits(family, tmp_path):
    write_llama(tmp_path / "model.gguf", family, F32)
    model, ref = qjax.hf.from_pretrained(tmp_path / "model.gguf"), reference(family)
    np.testing.assert_allclose(model(ref["input_ids"]), ref["logits"], atol=TOLERANCE)
    assert model.config.max_position_embeddings == 64
    assert model.config.tie_word_embeddings == golden_model(family).config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_a_quantized_file_is_decoded_to_its_own_values(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    write_llama(tmp_path / "model.gguf", "llama", kind)
    model = qjax.hf.from_pretrained(tmp_path / "model.gguf", scan_layers=True)
    stacked = golden_model("llama", scan_layers=True)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
        part, layer = name.split(".")
        ours = getattr(getattr(model.layers, part), layer).kernel[...]
        weight = getattr(getattr(stacked.layers, part), layer).kernel[...]
        for i in range(2):
            # Blocks run along `in`, which the row order of q and k leaves alone.
            rows = gguf.quants.quantize(np.asarray(weight[i].T), kind)
            np.testing.assert_array_equal(ours[i].T, gguf.quants.dequantize(rows, kind))


def test_another_architecture_names_the_known_one(tmp_path):
    write_llama(tmp_path / "model.gguf", "llama", F32, architecture="mamba")
    with pytest.raises(ValueError, match=r"general.architecture='mamba' .* known: \['llama'\]"):
        qjax.hf.from_pretrained(tmp_path / "model.gguf")


@pytest.mark.parametrize("keep", [0, 20, 3000])
def test_a_file_that_is_cut_or_no_gguf_is_named(keep, tmp_path):
    path = tmp_path / "model.gguf"
    write_llama(path, "llama", F32)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.gguf is not a whole GGUF file"):
        qjax.hf.from_pretrained(path)


def test_missing_packages_say_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] in ("gguf", "tokenizers", "huggingface_hub"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("importlib.import_module", lambda name: without(name))
    for call, path, extra in (
        (qjax.hf.from_pretrained, tmp_path / "model.gguf", "gguf"),
        (qjax.hf.from_pretrained, "owner/model", "hf"),
        (qjax.hf.load_tokenizer, FOLDER, "hf"),
    ):
        with pytest.raises(ModuleNotFoundError, match=rf"pip install 'qjax-quant\[{extra}\]'"):
            call(path)
