"""`qjax generate` prints what transformers generates."""

import json
import shutil

import pytest
import tokenizers
from typer.testing import CliRunner

import qjax.cli
from pallas_kernels import dispatch
from qjax.commands.generate import decode, fused
from tests.commands.words import word_tokenizer, words
from tests.models.golden import FOLDER, golden_model, reference


def run(*args, **options):
    return CliRunner().invoke(qjax.cli.app, ["generate", *map(str, args)], **options)


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden Llama, with a tokenizer."""
    folder = shutil.copytree(FOLDER / "llama" / "hf", tmp_path / "llama")
    word_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.slow
def test_the_text_is_that_of_transformers_up_to_its_end(folder):
    ids = reference("llama")["greedy"][0]
    prompt, answer = ids[:24], ids[24:]
    result = run(folder, "--prompt", words(prompt), "--max-new-tokens", 12)
    assert result.exit_code == 0, result.output
    assert result.output.split() == words(answer).split()
    end = int(answer[5])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    packed = run(folder, "-p", words(prompt), "--max-new-tokens", 12, "--kv-format", "int8")
    assert packed.output.split() == words(answer[: list(answer).index(end)]).split()
    result = run(folder, "--fuse", "--max-new-tokens", 12, input=words(prompt))
    assert result.output.split() == words(answer[: list(answer).index(end)]).split()


def test_a_chat_template_is_used_where_there_is_one(folder):
    ids = reference("llama")["greedy"][0]
    config = {"chat_template": words(ids[:20]) + " {{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    prompt = ("--prompt", words(ids[20:24]), "--max-new-tokens", 4)
    chat, plain = run(folder, *prompt), run(folder, *prompt, "--no-chat")
    assert chat.output.split() == words(ids[24:28]).split()
    assert plain.exit_code == 0 and plain.output != chat.output


@pytest.mark.slow
def test_t5_answers(tmp_path):
    folder, ref = shutil.copytree(FOLDER / "t5" / "hf", tmp_path / "t5"), reference("t5")
    word_tokenizer().save(str(folder / "tokenizer.json"))
    result = run(folder, "-p", words(ref["input_ids"][0]), "--max-new-tokens", 12)
    assert result.output.split() == words(ref["greedy"][0, 1:]).split()


@pytest.mark.slow
def test_a_seed_chooses_the_sample(folder):
    options = ("--prompt", "t3 t5", "--max-new-tokens", 6, "--temperature", 0.7, "--top-k", 5)
    first = run(folder, *options, "--quantize", "nf4")
    again = run(folder, *options, "--quantize", "nf4", "--seed", 0)
    other = run(folder, *options, "--quantize", "nf4", "--seed", 1)
    assert first.exit_code == 0 and first.output == again.output != other.output


def test_a_gpu_gets_fused_projections_where_they_can_be(monkeypatch):
    def load():
        return qjax.from_pretrained(FOLDER / "llama" / "hf")

    assert not is_fused(fused(load(), None).layers[0])
    gpu = dispatch.Target("gpu", "NVIDIA H100", (9, 0))
    monkeypatch.setattr("qjax.commands.generate.target", lambda: gpu)
    assert not is_fused(fused(load(), False).layers[0])
    assert is_fused(fused(load(), None).layers[0])
    fused(golden_model("t5"), None)
    with pytest.raises(NotImplementedError, match="Seq2SeqLM has no stack of blocks of its own"):
        fused(golden_model("t5"), True)


def is_fused(block):
    return hasattr(block.self_attn, "qkv_proj") and hasattr(block.mlp, "gate_up_proj")


def test_characters_of_several_tokens_are_shown_whole():
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocab = {char: i for i, char in enumerate(sorted(level.alphabet()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = level, tokenizers.decoders.ByteLevel()
    ids = tokenizer.encode("né €!").ids  # one token a byte: 2 for é, 3 for €
    pieces = list(decode(tokenizer, ids, ()))
    assert [piece for piece in pieces if piece] == ["n", "é", " ", "€", "!"]
    assert "".join(decode(tokenizer, ids, (ids[-1],))) == "né €"


@pytest.mark.parametrize(
    "args, message",
    [
        (("nothing", "-p", "t1"), "path_or_id='nothing' is no model folder"),
        ((FOLDER / "llama" / "hf", "-p", "t1"), "tokenizer.json is not a file"),
        (("{folder}", "-p", ""), "the prompt is empty"),
        (("{folder}", "-p", "t1", "--chat"), "has no chat template: use --no-chat"),
        (("{folder}", "-p", "t1", "--top-k", "3"), "have no effect at temperature=0"),
        (("{folder}", "-p", "t1 " * 64), "the prompt has 64 tokens, the model takes texts of 64"),
    ],
)
def test_an_error_is_one_line(args, message, folder):
    result = run(*(str(arg).format(folder=folder) for arg in args))
    assert result.exit_code == 1
    assert result.output.count("Error: ") == 1 and message in result.output


def test_help_says_what_the_options_are():
    result = run("--help")
    assert result.exit_code == 0
    for word in ("PATH", "--prompt", "--temperature", "--quantize", "--chat"):
        assert word in result.output
