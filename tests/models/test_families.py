"""Every family against transformers: logits with and without padding, and greedy tokens."""

import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import qjax.hf
from tests.models.golden import (
    DECODERS,
    FOLDER,
    PADDINGS,
    SEQ2SEQ,
    TOLERANCE,
    error,
    golden_model,
    reference,
)

forward = nnx.jit(lambda model, ids, mask, **kwargs: model(ids, mask, **kwargs))


def all_paddings(family):
    """One batch of the three, so that a family compiles once."""
    ref = reference(family)
    ids, mask, logits = (
        np.concatenate([ref[name + padding] for padding in PADDINGS])
        for name in ("input_ids", "attention_mask", "logits")
    )
    return ids, mask, logits


def slow_but(families, fast):
    return [f if f in fast else pytest.param(f, marks=pytest.mark.slow) for f in families]


@pytest.mark.parametrize("family", DECODERS)
def test_logits_equal_transformers(family):
    ids, mask, expected = all_paddings(family)
    logits = forward(golden_model(family), ids, mask)
    assert logits.dtype == np.float32
    assert error(logits, expected)[mask == 1].max() < TOLERANCE


# Those whose layers differ from each other are scanned in their own way.
@pytest.mark.parametrize("family", slow_but(DECODERS, ("llama", "gemma3", "gpt_oss")))
def test_scanned_layers_give_the_same_logits(family):
    ids, mask, expected = all_paddings(family)
    logits = forward(golden_model(family, scan_layers=True), ids, mask)
    assert error(logits, expected)[mask == 1].max() < TOLERANCE


@pytest.mark.parametrize("family", slow_but(DECODERS, ("mistral", "gpt2", "bloom", "mixtral")))
def test_greedy_tokens_equal_transformers(family):
    model, ref = golden_model(family), reference(family)
    for padding in ("", "_left"):
        ids, mask = ref["input_ids" + padding], ref["attention_mask" + padding]
        out = model.generate(ids, mask, max_new_tokens=12)
        np.testing.assert_array_equal(out, ref["greedy" + padding])


@pytest.mark.parametrize("family", slow_but(DECODERS, ("mistral", "bloom", "opt")))
def test_right_padding_changes_no_token(family):
    # A prompt behind which the cache has holes: windows, ALiBi and positions count real tokens.
    model, ids = golden_model(family), reference(family)["input_ids"]
    padded = np.pad(ids, ((0, 0), (0, 5)))
    mask = np.pad(np.ones_like(ids), ((0, 0), (0, 5)))
    out = model.generate(padded, mask, max_new_tokens=12)
    np.testing.assert_array_equal(out[:, 29:], reference(family)["greedy"][:, 24:])


def test_bert_equals_transformers():
    model, ref = golden_model("bert"), reference("bert")
    run = nnx.jit(lambda m, *args, **kw: (m(*args, **kw), m.encode(*args, **kw)))
    for padding in PADDINGS:
        mask = ref["attention_mask" + padding]
        types = ref["token_type_ids"]
        logits, hidden = run(model, ref["input_ids" + padding], mask, token_type_ids=types)
        assert error(logits, ref["logits" + padding])[mask == 1].max() < TOLERANCE
        expected = ref["last_hidden_state" + padding]
        assert error(hidden, expected)[mask == 1].max() < TOLERANCE


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_t5_equals_transformers(family):
    ids, mask, expected = all_paddings(family)
    decoder_ids = np.tile(reference(family)["decoder_input_ids"], (3, 1))
    logits = forward(golden_model(family), ids, mask, decoder_input_ids=decoder_ids)
    assert error(logits, expected).max() < TOLERANCE


@pytest.mark.parametrize("family", slow_but(SEQ2SEQ, ("t5",)))
def test_t5_generates_what_transformers_generates(family):
    model, ref = golden_model(family), reference(family)
    for padding in PADDINGS:
        ids, mask = ref["input_ids" + padding], ref["attention_mask" + padding]
        out = model.generate(ids, mask, max_new_tokens=12)
        np.testing.assert_array_equal(out, ref["greedy" + padding])


@pytest.mark.parametrize("file", ["config_longrope.json", "config_longrope_old.json"])
def test_longrope_equals_transformers_on_both_sides_of_its_length(file, tmp_path):
    with np.load(FOLDER / "phi3" / "longrope.npz") as arrays:
        expected = dict(arrays)
    (tmp_path / "model.safetensors").symlink_to(FOLDER / "phi3" / "hf" / "model.safetensors")
    (tmp_path / "config.json").write_text((FOLDER / "phi3" / file).read_text())
    model, ids = qjax.hf.from_pretrained(tmp_path), reference("phi3")["input_ids"]
    assert error(model(ids), expected["long"]).max() < TOLERANCE
    assert error(model(ids[:, :12]), expected["short"]).max() < TOLERANCE
    out = model.generate(ids[:, :20], max_new_tokens=12)
    np.testing.assert_array_equal(out, expected["greedy"])


def test_an_old_tied_t5_ignores_the_copy_of_its_head(tmp_path):
    folder, ref = FOLDER / "t5" / "hf", reference("t5")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["shared.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["scale_decoder_outputs"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = qjax.hf.from_pretrained(tmp_path)
    logits = model(ref["input_ids"], decoder_input_ids=ref["decoder_input_ids"])
    assert error(logits, ref["logits"]).max() < TOLERANCE


def test_files_of_old_spelling_or_without_a_head_give_the_same(tmp_path):
    """As on the hub: gpt2 without "transformer.", bert with gamma and beta, and with neither."""
    for family, prefix in (("gpt2", "transformer."), ("bert", "bert.")):
        target = tmp_path / family
        target.mkdir()
        old = {}
        for name, value in load_file(FOLDER / family / "hf" / "model.safetensors").items():
            if name.startswith("cls."):
                continue
            name = name.removeprefix(prefix).replace("LayerNorm.weight", "LayerNorm.gamma")
            old[name.replace("LayerNorm.bias", "LayerNorm.beta")] = value
        buffer = "h.0.attn.bias" if family == "gpt2" else "embeddings.position_ids"
        save_file({**old, buffer: np.ones((1, 4), np.float32)}, target / "model.safetensors")
        (target / "config.json").write_text((FOLDER / family / "hf" / "config.json").read_text())
        model = qjax.hf.from_pretrained(target)
        for path, leaf in nnx.to_flat_state(nnx.state(model)):
            other = golden_model(family)
            for part in path:
                other = other[part] if isinstance(part, int) else getattr(other, part)
            np.testing.assert_array_equal(leaf[...], other[...])
    with pytest.raises(ValueError, match=r"no language-model head: use model\.encode"):
        model(np.ones((1, 3), np.int32))
