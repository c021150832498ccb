"""A text in pieces has the tokens of the whole, and windows score each of them once."""

import itertools

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from qjax.quality.text import Frame, frame_of, read_tokens, rows_of, text_batches
from tests.commands.words import word_tokenizer, words

TEXT = (
    "It's 1,234 o'clock — naïve  readers don't\n\n mind;\ttabs, \r\n  and\u3000wide spaces.\n"
    "Übermäßig longwordwithoutanyspaceatall 東京都は日本の首都です。 ends <s> here </s>  \n \n"
) * 7


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, SmolLM2 and Llama 3 have it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def sentencepiece() -> tokenizers.Tokenizer:
    """As Llama 2 and Gemma have it: a mark before the first word, as before the others."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(marks)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.split(), trainer)
    tokenizer.decoder = decoders.Replace("▁", " ")
    return tokenizer


@pytest.mark.parametrize("piece", [40, 97, 10_000])
@pytest.mark.parametrize("make", [byte_level, sentencepiece, word_tokenizer])
def test_pieces_have_the_tokens_of_the_whole(make, piece, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    tokenizer = make()
    whole = tokenizer.encode((tmp_path / "text.txt").read_text("utf-8"), add_special_tokens=False)
    assert list(read_tokens(tmp_path / "text.txt", tokenizer, piece)) == whole.ids


def test_a_long_file_is_read_as_far_as_it_is_used(tmp_path):
    (tmp_path / "long.txt").write_text("word " * 100_000)

    class Counted:
        """A tokenizer that knows how much text it was given at once."""

        longest = 0

        def encode(self, text, **options):
            self.longest = max(self.longest, len(text))
            return tokenizer.encode(text, **options)

    tokenizer, counted = byte_level(), Counted()
    tokens = read_tokens(tmp_path / "long.txt", counted, piece=1000)
    assert len(list(itertools.islice(tokens, 10_000))) == 10_000
    assert counted.longest < 1100  # a piece and the context in front of it


@pytest.mark.parametrize("count, room, stride", [(23, 8, 3), (8, 8, 8), (9, 8, 8), (3, 8, 4)])
def test_windows_are_those_of_transformers(count, room, stride):
    """The loop of its guide to perplexity: a window ends at most `room` after it begins."""
    expected, previous = [], 0
    for begin in range(0, count, stride):
        end = min(begin + room, count)
        expected.append((list(range(begin, end)), end - previous))
        previous = end
        if end == count:
            break
    assert list(rows_of(range(count), room, stride)) == expected


def test_special_tokens_frame_every_window(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="t1 $A t2", special_tokens=[("t1", 1), ("t2", 2)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    (tmp_path / "text.txt").write_text(words(range(10, 20)))
    sizes = {"window": 6, "stride": 3, "batch_size": 2}
    causal = list(text_batches(tmp_path / "text.txt", tokenizer, **sizes))
    assert frame_of(tokenizer) == Frame((1,), (2,))
    ids = np.concatenate([batch.ids for batch in causal])
    np.testing.assert_array_equal(ids[0], [1, 10, 11, 12, 13, 14])
    np.testing.assert_array_equal(ids[1], [1, 13, 14, 15, 16, 17])
    np.testing.assert_array_equal(ids[2], [1, 16, 17, 18, 19, 0])
    scored = np.concatenate([batch.scored for batch in causal])
    np.testing.assert_array_equal(ids[scored], range(10, 20))
    encoder = next(text_batches(tmp_path / "text.txt", tokenizer, ends=True, **sizes))
    np.testing.assert_array_equal(encoder.ids[0], [1, 10, 11, 12, 13, 2])
    assert encoder.real[0].all()


def test_the_last_batch_has_the_shape_of_the_others(tmp_path):
    (tmp_path / "text.txt").write_text(words(range(10)))
    sizes = {"window": 4, "stride": 4, "batch_size": 2}
    batches = list(text_batches(tmp_path / "text.txt", word_tokenizer(), **sizes))
    assert [batch.ids.shape for batch in batches] == [(2, 4), (2, 4)]
    assert batches[1].real.tolist() == [[True, True, False, False], [False] * 4]
    short = {"window": 100, "stride": 50, "batch_size": 8, "max_tokens": 7}
    (alone,) = text_batches(tmp_path / "text.txt", word_tokenizer(), **short)
    assert alone.ids.tolist() == [list(range(7))]


@pytest.mark.parametrize(
    "content, sizes, message",
    [
        (b"", (8, 4), "text.txt is empty"),
        (b" \n ", (8, 4), "text.txt is empty"),
        (b"t5", (8, 4), "text.txt is shorter than two tokens"),
        (b"\xff\xfe", (8, 4), "text.txt is not UTF-8 text: 'utf-8' codec"),
        (b"t5 t6", (1, 1), "window=1 must hold 2 tokens and the 0 special ones"),
        (b"t5 t6", (8, 9), "stride=9 must be from 1 to 8"),
        (b"t5 t6", (8, 0), "stride=0 must be from 1 to 8"),
    ],
)
def test_misuse(content, sizes, message, tmp_path):
    (tmp_path / "text.txt").write_bytes(content)
    window, stride = sizes
    batches = text_batches(tmp_path / "text.txt", word_tokenizer(), window=window, stride=stride)
    with pytest.raises(ValueError, match=message):
        next(batches)


def test_no_file(tmp_path):
    batches = text_batches(tmp_path / "none.txt", word_tokenizer(), window=8, stride=4)
    with pytest.raises(FileNotFoundError, match=r"none.txt does not exist"):
        next(batches)
