"""gpt-oss as OpenAI stores it, its experts in MXFP4: values and logits of transformers."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qjax.hf
from qjax.core.config import QuantConfig
from tests.models.golden import FOLDER, TOLERANCE, error

MXFP4 = FOLDER / "gpt_oss" / "mxfp4"
DOWN = "model.layers.0.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def ref():
    with np.load(MXFP4 / "ref.npz") as arrays:
        return dict(arrays)


def test_values_and_logits_equal_transformers(ref):
    model = qjax.hf.from_pretrained(MXFP4, dtype="float32")
    kernel = model.layers[0].mlp.experts.down_proj.kernel[...]
    np.testing.assert_array_equal(kernel, ref["down_proj"])
    assert error(model(ref["input_ids"]), ref["logits"]).max() < TOLERANCE


@pytest.mark.parametrize("config", [None, QuantConfig(compute_dtype="float32")])
def test_one_token_is_computed_by_its_own_experts_alone(config, ref):
    model = qjax.hf.from_pretrained(MXFP4, dtype="float32", config=config)
    ids = ref["input_ids"][:1]
    whole = model(ids)[..., ::4] if config else ref["logits"][:1]  # by every expert, then weighed
    assert error(model(ids[:, :1]), whole[:, :1]).max() < TOLERANCE


def test_experts_are_quantized_and_written_without_mxfp4(ref, tmp_path):
    config = QuantConfig(double_quant=False, block_size=32, include="experts")
    model = qjax.hf.from_pretrained(MXFP4, config=config)
    layer = model.layers[0].mlp.experts.down_proj
    assert layer.kernel.q.format == "nf4"
    # NF4's steps are at most 0.305 of the block's largest value apart: half of that is the error.
    difference = np.abs(np.asarray(layer.kernel[...], np.float32) - ref["down_proj"])
    blocks = np.abs(ref["down_proj"]).reshape(4, 64, 2, 32).max(axis=-1, keepdims=True)
    assert (difference.reshape(4, 64, 2, 32) <= 0.1525 * blocks + 2**-8 * blocks).all()
    model.save_pretrained(tmp_path, layout="float")
    again = qjax.hf.from_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    np.testing.assert_array_equal(again.layers[0].mlp.experts.down_proj.kernel[...],
                                  layer.kernel[...])  # fmt: skip


def test_blocks_that_are_none_are_named(tmp_path):
    shutil.copy(MXFP4 / "config.json", tmp_path)

    def load(**changes):
        tensors = load_file(MXFP4 / "model.safetensors") | changes
        kept = {name: value for name, value in tensors.items() if value is not None}
        save_file(kept, tmp_path / "model.safetensors")
        qjax.hf.from_pretrained(tmp_path)

    with pytest.raises(ValueError, match=f"{DOWN}_blocks' is in MXFP4 and has no '{DOWN}_scales"):
        load(**{f"{DOWN}_scales": None})
    with pytest.raises(
        ValueError, match=f"'{DOWN}': blocks uint8.4, 64, 2, 16. and scales uint8.2"
    ):
        load(**{f"{DOWN}_scales": np.zeros((2, 64, 2), np.uint8)})
    with pytest.raises(ValueError, match=rf"'{DOWN}' has shape .2, 64, 64., .* says .4, 64, 64."):
        load(
            **{
                f"{DOWN}_scales": np.zeros((2, 64, 2), np.uint8),
                f"{DOWN}_blocks": np.zeros((2, 64, 2, 16), np.uint8),
            }
        )
