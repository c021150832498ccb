"""What we write is, byte for byte, what transformers and bitsandbytes write."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import qjax.hf
from qjax.core.config import QuantConfig
from qjax.models import CausalLM
from qjax.nn.lora import LoraConfig
from qjax.swap.nnx_lora import add_lora
from tests.models.golden import FAMILIES, FOLDER, golden_model, write_bnb


def same_files(ours, theirs):
    for file in ("model.safetensors", "config.json"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file


@pytest.mark.parametrize("family", FAMILIES)
def test_a_4bit_model_is_written_as_it_was_read(family, tmp_path):
    (tmp_path / "theirs").mkdir()
    theirs = write_bnb(family, tmp_path / "theirs")
    qjax.hf.from_pretrained(theirs).save_pretrained(tmp_path / "ours")
    same_files(tmp_path / "ours", theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float_model_is_written_as_it_was_read(family, tmp_path):
    golden_model(family).save_pretrained(tmp_path, layout="float")
    same_files(tmp_path, FOLDER / family / "hf")


def test_a_bfloat16_checkpoint_is_written_as_it_was_read(tmp_path):
    theirs = FOLDER / "llama" / "bnb_bf16"
    qjax.hf.from_pretrained(theirs).save_pretrained(tmp_path)
    same_files(tmp_path, theirs)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral"])
def test_quantizing_here_writes_what_bitsandbytes_quantizes_to(family, tmp_path):
    config = QuantConfig(compute_dtype=jnp.float32)
    model = qjax.hf.from_pretrained(FOLDER / family / "hf", config=config)
    if family == "mixtral":  # experts: decoded, for bitsandbytes has no layout for them
        config = QuantConfig(compute_dtype=jnp.float32, exclude="experts")
        model = qjax.hf.from_pretrained(FOLDER / family / "hf", config=config)
    model.save_pretrained(tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    theirs = load_file(FOLDER / family / "bnb" / "quantized.safetensors")
    for name, expected in theirs.items():
        if "nested_absmax" in name:
            # The second level is of scales less their mean, which each sums in its own order.
            np.testing.assert_allclose(ours[name], expected, rtol=1e-5)
        elif "quant_state" in name:
            one, other = (json.loads(bytes(value)) for value in (ours[name], expected))
            offsets = [state.pop("nested_offset") for state in (one, other)]
            assert one == other
            np.testing.assert_allclose(*offsets, rtol=1e-6)
        elif name.endswith(".absmax"):
            # So a code at a boundary may move by one.
            moved = ours[name].astype(int) - expected
            assert np.abs(moved).max() <= 1 and (moved != 0).mean() < 0.02
        else:
            np.testing.assert_array_equal(ours[name], expected)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == json.loads((FOLDER / family / "bnb" / "config.json").read_text())


def test_stacked_layers_are_written_one_by_one(tmp_path):
    (tmp_path / "theirs").mkdir()
    theirs = write_bnb("mixtral", tmp_path / "theirs")
    qjax.hf.from_pretrained(theirs, scan_layers=True).save_pretrained(tmp_path / "ours")
    same_files(tmp_path / "ours", theirs)


def test_quantized_experts_are_decoded(tmp_path):
    config = QuantConfig(double_quant=False, compute_dtype=jnp.float32)
    model = qjax.hf.from_pretrained(FOLDER / "mixtral" / "hf", config=config)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    w1 = tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    kernel = model.layers[1].mlp.experts.gate_proj.kernel[...]
    np.testing.assert_array_equal(w1, kernel[2].T)


def test_layers_left_in_float_are_listed_for_transformers(tmp_path):
    config = QuantConfig(exclude="layers/0/mlp")
    qjax.hf.from_pretrained(FOLDER / "llama" / "hf", config=config).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    mlp = [f"model.layers.0.mlp.{name}_proj" for name in ("down", "gate", "up")]
    assert config["llm_int8_skip_modules"] == ["lm_head", *mlp]
    again = qjax.hf.from_pretrained(tmp_path)
    assert isinstance(again.layers[0].mlp.up_proj.kernel, nnx.Param)


def test_adapters_are_merged_in_float_and_left_out_in_4_bits(tmp_path):
    model = qjax.hf.from_pretrained(FOLDER / "llama" / "hf", config=QuantConfig())
    model.save_pretrained(tmp_path / "base")
    add_lora(model, LoraConfig(rank=2, include="up_proj"), rngs=nnx.Rngs(0))
    layer = model.layers[0].mlp.up_proj
    layer.lora_b.set_value(jnp.ones_like(layer.lora_b[...]))
    model.save_pretrained(tmp_path / "adapted")
    same_files(tmp_path / "adapted", tmp_path / "base")
    model.save_pretrained(tmp_path / "merged", layout="float", dtype=jnp.bfloat16)
    merged = qjax.hf.from_pretrained(tmp_path / "merged")
    assert merged.dtype == jnp.bfloat16
    a, b = (np.asarray(p[...], np.float64) for p in (layer.lora_a, layer.lora_b))
    w = np.asarray(layer.kernel[...], np.float64) + layer.lora_config.scaling * a @ b
    got = np.asarray(merged.layers[0].mlp.up_proj.kernel[...], np.float64)
    np.testing.assert_allclose(got, w, rtol=2**-8, atol=1e-6)  # one rounding to bfloat16


def test_large_models_are_written_in_shards(tmp_path):
    golden_model("llama").save_pretrained(tmp_path, layout="float", max_shard_size=100_000)
    files = sorted(file.name for file in tmp_path.iterdir())
    shards = [name for name in files if name.startswith("model-0000")]
    assert len(shards) > 1
    assert files == ["config.json", *shards, "model.safetensors.index.json"]
    again = qjax.hf.from_pretrained(tmp_path)
    for one, other in zip(
        *(nnx.to_flat_state(nnx.state(m)) for m in (again, golden_model("llama")))
    ):
        np.testing.assert_array_equal(one[1][...], other[1][...])
    golden_model("llama").save_pretrained(tmp_path, layout="float")  # no index left to mislead
    same_files(tmp_path, FOLDER / "llama" / "hf")


def test_what_cannot_be_written_is_named(tmp_path):
    model = golden_model("llama")
    with pytest.raises(ValueError, match=r"layout='gguf' must be one of"):
        model.save_pretrained(tmp_path, layout="gguf")
    with pytest.raises(ValueError, match=r"the model has no 4-bit weight; use layout=.float"):
        model.save_pretrained(tmp_path)
    new = CausalLM(model.config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"was not loaded from a folder .* pass config="):
        new.save_pretrained(tmp_path, layout="float")
    assert not list(tmp_path.iterdir())
    data = json.loads((FOLDER / "llama" / "hf" / "config.json").read_text())
    new.save_pretrained(tmp_path, layout="float", config=data)
    assert (tmp_path / "model.safetensors").is_file()
