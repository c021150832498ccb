"""Tokenizers rebuilt from GGUF metadata against the `tokenizers` objects they were written from."""

import pytest
import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

import qjax.hf
from tests.hf.gguf_files import write_tokenizer

TEXT = "The year 1234: häuser, 東京 and it's 56 old   houses.\n\tNaïve 🙂 text<|end|>again"


def trained(digits: bool) -> tokenizers.Tokenizer:
    """A small byte-level BPE tokenizer, as SmolLM's (digits apart) or GPT-2's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = ByteLevel(add_prefix_space=False)
    steps = [Digits(individual_digits=True), level] if digits else [level]
    tokenizer.pre_tokenizer = Sequence(steps)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, "houses and years 12 1234 5678"] * 4, trainer)
    return tokenizer


@pytest.mark.parametrize("pre, digits", [("smollm", True), ("gpt-2", False)])
def test_a_gguf_tokenizer_equals_the_one_it_was_written_from(pre, digits, tmp_path):
    original = trained(digits)
    write_tokenizer(tmp_path / "model.gguf", original, pre)
    loaded = qjax.hf.load_tokenizer(tmp_path / "model.gguf")
    ids = original.encode(TEXT).ids
    assert loaded.encode(TEXT).ids == ids
    assert loaded.decode(ids) == original.decode(ids)
    assert loaded.token_to_id("<|end|>") == 0
    assert 0 in ids


def test_tokenizer_json_is_read_from_a_folder_or_by_name(tmp_path):
    original = trained(True)
    original.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert qjax.hf.load_tokenizer(path).encode(TEXT).ids == original.encode(TEXT).ids


def test_another_kind_of_tokenizer_is_named(tmp_path):
    write_tokenizer(tmp_path / "model.gguf", trained(True), "llama-bpe")
    with pytest.raises(NotImplementedError, match=r"='gpt2' with pre='llama-bpe'; known: 'gpt2'"):
        qjax.hf.load_tokenizer(tmp_path / "model.gguf")


def test_nothing_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer.json is not a file: no tokenizer to load"):
        qjax.hf.load_tokenizer(tmp_path)
