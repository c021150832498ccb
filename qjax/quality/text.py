"""A text as windows of tokens, read piece by piece: the file may be larger than the memory."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_PIECE = 1 << 16  # characters that are tokenized at once
_CONTEXT = 64  # characters in front of them


class Batch(NamedTuple):
    """Rows of tokens.

    Attributes:
        ids: int32 [B, T], padded on the right.
        scored: bool [B, T], True on tokens of the text that no earlier row held.
        real: bool [B, T], False on padding.
    """

    ids: np.ndarray
    scored: np.ndarray
    real: np.ndarray


class Frame(NamedTuple):
    """The special tokens that a tokenizer puts around a text, such as BOS, or [CLS] and [SEP]."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def frame_of(tokenizer: Any) -> Frame:
    """Return what a `tokenizers.Tokenizer` adds to a text."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    ids = tokenizer.encode("a").ids
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            return Frame(tuple(ids[:start]), tuple(ids[start + len(bare) :]))
    return Frame()


def text_batches(
    file: Path,
    tokenizer: Any,
    *,
    window: int,
    stride: int,
    batch_size: int = 1,
    max_tokens: int | None = None,
    ends: bool = False,
) -> Iterator[Batch]:
    """Yield a text as overlapping windows, so that each token is predicted from those before it.

    Args:
        file: UTF-8.
        tokenizer: a `tokenizers.Tokenizer`; its truncation and padding are turned off. What it puts
            in front of a text is in front of every window.
        window: T, the tokens of a row.
        stride: tokens that a window is further on than the one before; the others are its context,
            and not scored again.
        batch_size: rows.
        max_tokens: stop after so many tokens of the text.
        ends: put what the tokenizer adds behind a text behind every window too, as encoders need.

    Raises:
        ValueError: the text is empty, shorter than two tokens, or not UTF-8; a window that cannot
            hold two tokens, or a stride that would leave tokens out.
        FileNotFoundError: there is no such file.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    before, after = frame_of(tokenizer)
    after = after if ends else ()
    room = window - len(before) - len(after)
    if room < 2:
        raise ValueError(f"window={window} must hold 2 tokens and the {window - room} special ones")
    if not 1 <= stride <= room:
        raise ValueError(
            f"stride={stride} must be from 1 to {room}, the tokens of the text in a window"
        )
    tokens = itertools.islice(read_tokens(file, tokenizer), max_tokens)
    rows = rows_of(tokens, room, stride)
    first = next(rows, ([], 0))
    if len(first[0]) < 2:
        what = "is empty" if not first[0] else "is shorter than two tokens"
        raise ValueError(f"{file} {what}: there is nothing to evaluate on")
    width = window if len(first[0]) == room else window - room + len(first[0])
    for group in itertools.batched(itertools.chain([first], rows), batch_size):
        count = batch_size if width == window else 1  # a text of one row is not padded
        batch = Batch(*(np.zeros((count, width), kind) for kind in (np.int32, bool, bool)))
        for i, (row, new) in enumerate(group):
            ids = [*before, *row, *after]
            end = len(before) + len(row)
            batch.ids[i, : len(ids)] = ids
            batch.scored[i, end - new : end] = True
            batch.real[i, : len(ids)] = True
        yield batch


def rows_of(tokens: Iterable[int], room: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Yield windows of at most `room` tokens, and how many at the end of each are new."""
    window: list[int] = []
    new = 0
    for token in tokens:
        if len(window) == room:
            yield window, new
            window, new = window[stride:], 0
        window.append(token)
        new += 1
    if new:
        yield window, new


def read_tokens(file: Path, tokenizer: Any, piece: int = _PIECE) -> Iterator[int]:
    """Yield the tokens of a file, without special ones, as if it were tokenized at once.

    It is cut where a word ends, and each piece is tokenized behind the end of the one before:
    tokenizers may treat the beginning of a text differently.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist, or is no file")
    before = ""
    for text in _pieces(file, piece):
        encoded = tokenizer.encode(before + text, add_special_tokens=False)
        for token, (start, _) in zip(encoded.ids, encoded.offsets, strict=True):
            if start >= len(before):
                yield token
        before = (before + text)[-_CONTEXT:]


def _pieces(file: Path, size: int) -> Iterator[str]:
    held = ""
    with file.open(encoding="utf-8") as text:
        try:
            while new := text.read(size):
                held += new
                cut = _word_end(held) or len(held)
                yield held[:cut]
                held = held[cut:]
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from None
    if held:
        yield held


def _word_end(text: str) -> int:
    """Return where the last word that has ended ends; 0 if there is none."""
    ends = (i for i in range(len(text) - 1, 0, -1) if text[i].isspace())
    return next((i for i in ends if not text[i - 1].isspace()), 0)
