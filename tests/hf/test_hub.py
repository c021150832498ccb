"""Models of the hub: found in its cache, without a network."""

import shutil

import numpy as np
import pytest

import qjax.hf
from tests.models.golden import FOLDER, TOLERANCE, reference


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache as huggingface_hub lays it out, with one model, and no network."""
    model = tmp_path / "models--owner--tiny"
    snapshot = model / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(FOLDER / "llama" / "hf", snapshot)
    (snapshot / "tokenizer.json").write_text('{"model": {"type": "WordLevel", "vocab": {"a": 0}, '
                                             '"unk_token": "a"}}')  # fmt: skip
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_cached_model_needs_no_network(cache):
    model, ref = qjax.hf.from_pretrained("owner/tiny"), reference("llama")
    np.testing.assert_allclose(model(ref["input_ids"]), ref["logits"], atol=TOLERANCE)
    assert qjax.hf.load_tokenizer("owner/tiny").encode("a").ids == [0]


@pytest.mark.parametrize("name", ["owner/other", "owner/a--b"])
def test_a_model_that_is_not_there_is_one_line(cache, name):
    with pytest.raises(ValueError, match=rf"path_or_id='{name}' is no folder here, and the hub"):
        qjax.hf.from_pretrained(name)
