"""GGUF files written by the gguf package give transformers' logits."""

import builtins
import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

import qjax.hf
from qjax.hf.gguf import GGUFFile
from qjax.hf.safetensors import SafetensorsFolder
from qjax.models import RopeConfig
from tests.hf.gguf_files import write_model
from tests.models.golden import FOLDER, TOLERANCE, error, golden_model, reference
from tests.models.test_families import slow_but

F32 = gguf.GGMLQuantizationType.F32


ARCHITECTURES = (
    *("llama", "llama_tied", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"),
    *("gpt2", "bloom", "gpt_neox", "gpt_oss"),
)


@pytest.mark.parametrize("family", slow_but(ARCHITECTURES, ("llama_tied", "gemma2", "gpt_oss")))
def test_a_float_file_gives_transformers_logits(family, tmp_path):
    write_model(tmp_path / "model.gguf", family, F32)
    model, ref = qjax.hf.from_pretrained(tmp_path / "model.gguf"), reference(family)
    assert error(model(ref["input_ids"]), ref["logits"]).max() < TOLERANCE
    assert model.config.tie_word_embeddings == golden_model(family).config.tie_word_embeddings


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_float_file_gives_the_config_and_the_weights_of_the_folder(family, tmp_path):
    write_model(tmp_path / "model.gguf", family, F32)
    file, folder = GGUFFile(tmp_path / "model.gguf"), SafetensorsFolder(FOLDER / family / "hf")
    assert file.tensors == folder.tensors
    for name in folder.tensors:
        # Gemma's norms, up to 8, are stored as 1 + weight: half a last bit of float32.
        np.testing.assert_allclose(file.read(name), folder.read(name), rtol=0, atol=5e-7)
    assert sizes(file.config) == sizes(folder.config)


def sizes(config):
    """What a file says exactly: the logits speak for RoPE; Bloom has no longest text."""
    scale = config.attention_scale and round(config.attention_scale, 6)
    return replace(config, rope=RopeConfig(), max_position_embeddings=64, attention_scale=scale)


def test_a_bert_file_gives_transformers_hidden_states(tmp_path):
    write_model(tmp_path / "model.gguf", "bert", F32)
    model, ref = qjax.hf.from_pretrained(tmp_path / "model.gguf"), reference("bert")
    hidden = model.encode(ref["input_ids"], token_type_ids=ref["token_type_ids"])
    assert error(hidden, ref["last_hidden_state"]).max() < TOLERANCE


def test_longrope_of_phi3(tmp_path):
    config = json.loads((FOLDER / "phi3" / "config_longrope.json").read_text())
    rope = config.pop("rope_parameters")
    plain = rope | {"rope_type": "default"}
    path = tmp_path / "model.gguf"
    write_model(path, "phi3", F32, rope_parameters=plain, factors=rope)
    ids = reference("phi3")["input_ids"]
    with np.load(FOLDER / "phi3" / "longrope.npz") as expected:
        model = qjax.hf.from_pretrained(path)
        assert error(model(ids), expected["long"]).max() < TOLERANCE
        assert error(model(ids[:, :12]), expected["short"]).max() < TOLERANCE


def test_a_file_is_written_as_a_folder(tmp_path):
    write_model(tmp_path / "model.gguf", "gpt2", F32)
    model = qjax.hf.from_pretrained(tmp_path / "model.gguf")
    model.save_pretrained(tmp_path / "folder", layout="float")
    ours, theirs = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "folder", FOLDER / "gpt2" / "hf")
    )
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "F16"])
def test_a_quantized_file_is_decoded_to_its_own_values(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    write_model(tmp_path / "model.gguf", "llama", kind)
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
    write_model(tmp_path / "model.gguf", "llama", F32, architecture="mamba")
    with pytest.raises(ValueError, match=r"general.architecture='mamba' .* known: \['bert', "):
        qjax.hf.from_pretrained(tmp_path / "model.gguf")


@pytest.mark.parametrize("keep", [0, 20, 3000])
def test_a_file_that_is_cut_or_no_gguf_is_named(keep, tmp_path):
    path = tmp_path / "model.gguf"
    write_model(path, "llama", F32)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.gguf is not a whole GGUF file"):
        qjax.hf.from_pretrained(path)


@pytest.mark.parametrize("at", ["tensors", "pairs", "string", "array"])
def test_a_count_that_lies_is_named_and_does_not_hang(at, tmp_path):
    path = tmp_path / "model.gguf"
    write_model(path, "gemma2", F32)
    data = bytearray(path.read_bytes())
    key = b"gemma2.attention.sliding_window_pattern"
    place = {
        "tensors": 8,
        "pairs": 16,
        "string": 24,  # the length of the first key
        "array": data.index(key) + len(key) + 8,
    }[at]
    data[place : place + 8] = (2**60).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"not a whole GGUF file: it ends in its head"):
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
