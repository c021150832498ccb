"""Model folders: what they give is compared with transformers, what is wrong with them is named."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import qjax.hf
from qjax.hf.safetensors import SafetensorsFolder
from tests.models.golden import FOLDER, TOLERANCE, reference


@pytest.fixture
def folder(tmp_path):
    """A writable copy of the golden Llama."""
    return shutil.copytree(FOLDER / "llama" / "hf", tmp_path / "llama")


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def shard(folder):
    """Split the one file into two with an index, as save_pretrained does."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a-00001.safetensors": names[:5], "a-00002.safetensors": names[5:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {name: file for file, held in parts.items() for name in held}
    (folder / "model.safetensors").unlink()
    write_index(folder, index)
    return index


def write_index(folder, weight_map):
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("family", sorted(f.parent.name for f in FOLDER.glob("*/*_legacy.json")))
def test_both_spellings_of_a_config_mean_the_same(family, tmp_path):
    folder = shutil.copytree(FOLDER / family / "hf", tmp_path / family)
    new = SafetensorsFolder(folder)
    shutil.copy(FOLDER / family / "config_legacy.json", folder / "config.json")
    old = SafetensorsFolder(folder)
    assert new.config == old.config
    assert new.dtype == old.dtype == "float32"


def test_shards_give_the_same_model(folder):
    shard(folder)
    model, ref = qjax.hf.from_pretrained(folder), reference("llama")
    np.testing.assert_allclose(model(ref["input_ids"]), ref["logits"], atol=TOLERANCE)


def test_weights_take_the_dtype_asked_for_or_the_stored_one(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: value.astype(jnp.bfloat16) for name, value in tensors.items()},
        folder / "model.safetensors",
    )
    edit_config(folder, dtype="bfloat16")
    for asked, expected in ((None, jnp.bfloat16), (jnp.float32, jnp.float32)):
        model = qjax.hf.from_pretrained(folder, dtype=asked)
        leaves = nnx.to_flat_state(nnx.state(model, nnx.Param))
        assert {leaf.dtype for _, leaf in leaves} == {jnp.dtype(expected)}
        kernel = model.layers[1].mlp.up_proj.kernel[...]
        stored = tensors["model.layers.1.mlp.up_proj.weight"].T.astype(jnp.bfloat16)
        np.testing.assert_array_equal(kernel, stored.astype(expected))


def test_biases_are_loaded(folder):
    tensors = load_file(folder / "model.safetensors")
    bias = np.arange(64, dtype=np.float32)
    for i in range(2):
        for name, width in (("q", 64), ("k", 32), ("v", 32), ("o", 64)):
            tensors[f"model.layers.{i}.self_attn.{name}_proj.bias"] = bias[:width]
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, attention_bias=True)
    model = qjax.hf.from_pretrained(folder, scan_layers=True)
    np.testing.assert_array_equal(
        model.layers.self_attn.k_proj.bias[...], np.stack([bias[:32]] * 2)
    )


def test_an_unknown_family_names_the_known_ones(folder):
    edit_config(folder, model_type="mamba")
    with pytest.raises(ValueError, match=r"model_type='mamba' .* known: \['bert', .*'t5'\]"):
        qjax.hf.from_pretrained(folder)


def test_a_missing_key_is_named(folder):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["vocab_size"]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: no key 'vocab_size'"):
        qjax.hf.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"quantization_config": {"quant_method": "aqlm"}}, "quant_method=.aqlm. is not read"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type='dynamic'"),
    ],
)
def test_what_is_not_implemented_is_named(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(NotImplementedError, match=message):
        qjax.hf.from_pretrained(folder)


def drop(tensors):
    del tensors["model.norm.weight"]


def add(tensors):
    tensors["model.extra.weight"] = np.ones(3, np.float32)


def reshape(tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][:, :32])


@pytest.mark.parametrize(
    "change, message",
    [
        (drop, "lacks 1 tensors, first 'model.norm.weight'"),
        (add, "holds 1 tensors that the model has no place for, first 'model.extra.weight'"),
        (reshape, r"'model.layers.0.mlp.up_proj.weight' has shape \[64, 32\], .* says \[64, 64\]"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(folder, change, message):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        qjax.hf.from_pretrained(folder)


def test_a_truncated_file_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file"):
        qjax.hf.from_pretrained(folder)


@pytest.mark.parametrize(
    "name, change",
    [
        ("lm_head.weight", {"data_offsets": [0, 10**12]}),  # past the end
        ("lm_head.weight", {"data_offsets": [8, 4]}),
        ("model.norm.weight", {"data_offsets": [0, 256]}),  # another tensor's bytes
        ("lm_head.weight", {"shape": [128, 65]}),  # not of its bytes
        ("lm_head.weight", {"shape": [2**62, 64]}),
        ("lm_head.weight", {"dtype": "F7"}),
    ],
)
def test_a_header_that_lies_is_named(folder, name, change):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[name] |= change
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file"):
        qjax.hf.from_pretrained(folder)


@pytest.mark.parametrize("length", [0, 2**40, 2**63])
def test_a_length_of_the_header_that_lies_is_named(folder, length):
    file = folder / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file"):
        qjax.hf.from_pretrained(folder)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts"])
def test_a_count_of_more_than_there_are_tensors_is_named(key, tmp_path):
    folder = shutil.copytree(FOLDER / "mixtral" / "hf", tmp_path / "mixtral")
    edit_config(folder, **{key: 10**12})
    with pytest.raises(ValueError, match=f"{key}=1000000000000: more than there are tensors"):
        qjax.hf.from_pretrained(folder)


def test_a_pickle_is_refused_with_the_reason(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"neither .* \(pytorch_model.bin is a pickle"):
        qjax.hf.from_pretrained(folder)


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "..", "", 3])
def test_an_index_cannot_name_a_file_outside_the_folder(folder, name):
    index = shard(folder)
    write_index(folder, index | {"lm_head.weight": name})
    with pytest.raises(ValueError, match="is not a file name in the folder"):
        qjax.hf.from_pretrained(folder)


def test_a_missing_shard_and_a_wrong_index_are_named(folder):
    index = shard(folder)
    write_index(folder, index | {"lm_head.weight": "a-00002.safetensors"})
    with pytest.raises(ValueError, match=r"puts 'lm_head.weight' in a-00002.safetensors, which do"):
        qjax.hf.from_pretrained(folder)
    write_index(folder, index)
    (folder / "a-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no a-00002.safetensors"):
        qjax.hf.from_pretrained(folder)


@pytest.mark.parametrize("text, message", [("{", "is not JSON"), ("[]", "a list, not a JSON obj")])
def test_broken_json_is_named(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json.* {message}"):
        qjax.hf.from_pretrained(folder)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./missing", "no-such-model", "a/b/c"])
def test_a_path_that_is_nothing_is_named(path):
    with pytest.raises(ValueError, match=r"is no model folder, .gguf file or hub id"):
        qjax.hf.from_pretrained(path)
