"""`qjax eval` and `qjax compare` against numpy's float64, partly on transformers' logits.

Perplexity and KL are of float32 logits, whose error of 2e-4 (tests/models/golden.py) on each of
about 20 tokens is the tolerance here, for a mean that is of size 1 to 10.
"""

import json
import shutil

import gguf
import matplotlib.image
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import processors
from typer.testing import CliRunner

import qjax
import qjax.cli
from tests.commands.words import word_tokenizer, words
from tests.hf.gguf_files import write_model
from tests.models.golden import FOLDER, golden_model, reference, write_bnb

TOLERANCE = 4e-4


def run(*args):
    return CliRunner().invoke(qjax.cli.app, list(map(str, args)), catch_exceptions=False)


def measured(*args, out):
    """The numbers that a command writes."""
    result = run(*args, "--out", out)
    assert result.exit_code == 0, result.output
    return json.loads(out.read_text()), result.output


@pytest.fixture
def files(tmp_path):
    """Golden Llamas in float and in bitsandbytes' 4 bits, and a text."""
    shutil.copytree(FOLDER / "llama" / "hf", tmp_path / "float")
    word_tokenizer().save(str(tmp_path / "float" / "tokenizer.json"))
    (tmp_path / "bnb").mkdir()
    write_bnb("llama", tmp_path / "bnb")
    (tmp_path / "text.txt").write_text(words(reference("llama")["input_ids"][0]))
    return tmp_path


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    largest = logits.max(-1, keepdims=True)
    return logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True))


def expected(logits, others, ids, scored):
    """Perplexities, KL and agreement of the tokens that are scored."""
    a, b = (log_softmax(x)[:, :-1][scored[:, 1:]] for x in (logits, others))
    targets = np.asarray(ids)[:, 1:][scored[:, 1:]][:, None]
    losses = [-np.take_along_axis(x, targets, 1).mean() for x in (a, b)]
    return {
        "perplexity": np.exp(losses[0]),
        "reference_perplexity": np.exp(losses[1]),
        "kl": (np.exp(b) * (b - a)).sum(-1).mean(),
        "agreement": (a.argmax(-1) == b.argmax(-1)).mean(),
    }


def assert_close(found, wanted):
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=TOLERANCE)


def test_a_4_bit_checkpoint_against_the_float_one(files):
    """One window: the logits are those that transformers and bitsandbytes computed."""
    plot = files / "errors.png"
    args = ("eval", files / "bnb", "--text", files / "text.txt", "--reference", files / "float")
    found, output = measured(*args, "--plot", plot, out=files / "report.json")
    ref, all_scored = reference("llama"), np.ones((1, 24), bool)
    ids = ref["input_ids"][:1]
    wanted = expected(ref["logits_nf4"][:1], ref["logits"][:1], ids, all_scored)
    assert_close(found, wanted)
    assert found["tokens"] == 23 and f"{found['perplexity']:.4f}" in output
    floats = load_file(files / "float" / "model.safetensors")
    decoded = qjax.from_pretrained(files / "bnb").layers[1].mlp.up_proj.kernel.q.dequantize()
    w = floats["model.layers.1.mlp.up_proj.weight"].T
    error = np.linalg.norm(np.asarray(decoded, np.float64) - w) / np.linalg.norm(w)
    # bitsandbytes' weights come back in the dtype of the checkpoint, float32.
    assert found["layer_errors"]["layers/1/mlp/up_proj/kernel"] == pytest.approx(error, rel=1e-5)
    assert len(found["layer_errors"]) == 14  # seven matrices of two layers, and no embedding
    assert matplotlib.image.imread(plot).ndim == 3


@pytest.mark.slow
def test_windows_overlap_and_score_each_token_once(files):
    """On the fly to NF4; each window is computed alone here, with the golden models."""
    args = ("eval", files / "float", "--text", files / "text.txt", "--format", "nf4")
    options = ("--window", 10, "--stride", 4, "--batch-size", 3)
    found, _ = measured(*args, *options, out=files / "report.json")
    ids = reference("llama")["input_ids"][0]
    model = qjax.from_pretrained(files / "float", config=qjax.QuantConfig(compute_dtype="float32"))
    begins = [0, 4, 8, 12, 16]  # the last window has 8 tokens
    rows, scored, logits, others = [], [], [], []
    for begin in begins:
        row = ids[begin : begin + 10]
        new = np.arange(len(row)) >= (0 if begin == 0 else 6)
        pad = 10 - len(row)
        rows.append(np.pad(row, (0, pad)))
        scored.append(np.pad(new, (0, pad)))
        for out, each in ((logits, model), (others, golden_model("llama"))):
            out.append(np.pad(np.asarray(each(row[None]))[0], ((0, pad), (0, 0))))
    wanted = expected(np.stack(logits), np.stack(others), np.stack(rows), np.stack(scored))
    assert_close(found, wanted)
    assert found["tokens"] == 23 and (found["window"], found["stride"]) == (10, 4)


def test_two_checkpoints_side_by_side(files):
    """A GGUF file, which holds no tokenizer, against the same model in NF4."""
    path = files / "model.gguf"
    write_model(path, "llama", gguf.GGMLQuantizationType.Q8_0)
    args = ("compare", path, files / "float", "--text", files / "text.txt")
    found, output = measured(*args, "--plot", files / "layers.png", out=files / "report.json")
    assert found["bits_per_param"] == pytest.approx(8 * found["bytes"] / found["params"])
    assert 8.5 < found["bits_per_param"] < 9  # Q8_0's 8.5, and norms in float32
    assert found["reference_bits_per_param"] == 32.0
    assert "embed_tokens/embedding" in found["layer_errors"]  # GGUF quantizes it as well
    assert f"{found['bytes']:,}" in output and "largest of" in output
    # Rounding to 8 bits errs by up to 1/254 of a block's largest weight.
    assert 0 < max(found["layer_errors"].values()) < 0.01
    ids = reference("llama")["input_ids"][:1]
    logits = qjax.from_pretrained(path)(ids)
    assert_close(found, expected(logits, golden_model("llama")(ids), ids, np.ones((1, 24), bool)))
    assert (files / "layers.png").stat().st_size > 1000


@pytest.mark.slow
def test_what_qjax_save_wrote(files):
    """Its architecture and its tokenizer are those of the reference."""
    cfg = qjax.QuantConfig(overrides={"layers/0": {"format": "int8"}}, compute_dtype="float32")
    (files / "config.json").write_text(
        json.dumps({"format": "nf4", "overrides": {"layers/0": {"format": "int8"}}})
    )
    model = qjax.from_pretrained(files / "float", config=cfg)
    qjax.save(files / "saved", model)
    text = ("--text", files / "text.txt")
    saved, _ = measured(
        "eval", files / "saved", *text, "--reference", files / "float", out=files / "a.json"
    )
    made, _ = measured(
        "eval", files / "float", *text, "--config", files / "config.json", out=files / "b.json"
    )
    ids = reference("llama")["input_ids"][:1]
    wanted = expected(model(ids), golden_model("llama")(ids), ids, np.ones((1, 24), bool))
    for found in (saved, made):
        assert_close(found, wanted)
        assert found["bytes"] == qjax.memory_footprint(model)
    both, output = measured(
        "compare", files / "saved", files / "saved", *text, "--base", files / "float",
        out=files / "c.json",
    )  # fmt: skip
    assert both["kl"] == 0 and both["agreement"] == 1 and "All weights are equal." in output


def test_encoders_are_compared_by_their_embeddings(tmp_path):
    folder = shutil.copytree(FOLDER / "bert" / "hf", tmp_path / "bert")
    tokenizer = word_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="t1 $A t2", special_tokens=[("t1", 1), ("t2", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = np.arange(10, 31)
    (tmp_path / "text.txt").write_text(words(ids))
    args = ("eval", folder, "--text", tmp_path / "text.txt")
    found, output = measured(
        *args, "--format", "nf4", "--window", 9, "--batch-size", 2, out=tmp_path / "report.json"
    )
    model = qjax.from_pretrained(folder, config=qjax.QuantConfig(compute_dtype="float32"))
    cosines = []
    for part in np.split(ids, 3):  # seven tokens, between the special ones
        row = np.concatenate([[1], part, [2]])[None]
        a, b = (
            np.asarray(each.encode(row), np.float64)[0].mean(0)
            for each in (model, golden_model("bert"))
        )
        cosines.append(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    # float32 sums of hidden states.
    np.testing.assert_allclose(
        [found["cosine"], found["lowest"]], [np.mean(cosines), min(cosines)], rtol=1e-5
    )
    assert found["texts"] == 3 and "cosine of the embeddings" in output
    refused = run(*args)
    assert refused.exit_code == 1 and "is an encoder, which has no perplexity" in refused.output


def test_keys_and_values_in_4_bits(files):
    """Against the same model without; the weights are equal."""
    args = ("eval", files / "float", "--text", files / "text.txt", "--kv-format", "int4")
    found, output = measured(*args, out=files / "report.json")
    ids = reference("llama")["input_ids"][:1]
    exact = golden_model("llama")(ids)
    wanted = expected(exact, exact, ids, np.ones((1, 24), bool))["reference_perplexity"]
    assert found["reference_perplexity"] == pytest.approx(wanted, rel=TOLERANCE)
    assert found["kl"] > 0 and found["layer_errors"] == {} and "All weights are equal." in output


def test_models_of_other_sizes(files):
    """Predictions of one vocabulary can be compared; weights cannot."""
    shutil.copytree(FOLDER / "gpt2" / "hf", files / "gpt2")
    args = ("compare", files / "gpt2", files / "float", "--text", files / "text.txt")
    found, output = measured(*args, out=files / "report.json")
    assert found["kl"] > 0 and "layer_errors" not in found
    assert "Weights are not compared: " in output


@pytest.mark.parametrize(
    "args, message",
    [
        (("eval", "{0}/none", "--text", "{0}/text.txt"), "is no model folder"),
        (("eval", "{0}/float", "--text", "{0}/none.txt"), "none.txt does not exist"),
        (("eval", "{0}/bnb", "--text", "{0}/text.txt"), "bnb has no tokenizer.json"),
        (
            ("eval", "{0}/bnb", "--text", "{0}/text.txt", "--format", "nf4"),
            "bnb is quantized already: it cannot be quantized to nf4",
        ),
        (("eval", "{0}/float", "--text", "{0}/text.txt", "--format", "nf5"), "format must be one"),
        (
            ("eval", "{0}/float", "--text", "{0}/text.txt", "--plot", "{0}/a.png"),
            "--plot shows errors against a model in floating point",
        ),
        (
            ("eval", "{0}/float", "--text", "{0}/text.txt", "--out", "{0}/no/a.json"),
            "there is no folder",
        ),
        (
            ("eval", "{0}/float", "--text", "{0}/text.txt", "--window", "65"),
            "window=65 is more than the 64 tokens that the model takes",
        ),
        (
            ("eval", "{0}/float", "--text", "{0}/text.txt", "--config", "{0}/text.txt"),
            "text.txt is not JSON",
        ),
        (
            ("compare", "{0}/float", "{0}/other", "--text", "{0}/text.txt"),
            "have different tokenizers",
        ),
        (
            ("compare", "{0}/bert", "{0}/float", "--text", "{0}/text.txt"),
            "are models of two kinds: MaskedLM and CausalLM",
        ),
        (("eval", "{0}/saved", "--text", "{0}/text.txt"), "name the model that it was made of"),
        (("eval", "{0}/t5", "--text", "{0}/text.txt"), "is an encoder-decoder model"),
    ],
)
def test_an_error_is_one_line(args, message, files):
    shutil.copytree(FOLDER / "llama" / "hf", files / "other")
    word_tokenizer("u").save(str(files / "other" / "tokenizer.json"))
    for family in ("bert", "t5"):
        shutil.copytree(FOLDER / family / "hf", files / family)
    (files / "saved").mkdir()
    (files / "saved" / "_CHECKPOINT_METADATA").touch()
    result = run(*(arg.format(files) for arg in args))
    assert result.exit_code == 1
    assert result.output.count("Error: ") == 1 and message in result.output, result.output
    assert result.output.count("\n") == 1
