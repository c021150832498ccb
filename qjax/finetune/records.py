"""JSONL to examples: one JSON object a line, as chats, as prompts with completions, or as texts."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qjax.hf.chat import ChatTemplate

KINDS = '"messages" (a chat), "prompt" and "completion", or "text"'


class Example(NamedTuple):
    """Tokens, and for each whether the model is trained to say it."""

    ids: list[int]
    trained: list[bool]


class Encoder(NamedTuple):
    """How text becomes tokens.

    Attributes:
        tokenizer: a `tokenizers.Tokenizer`.
        template: of chats; None where the model has none.
        eos: the token that ends a text; None where the model has none.
    """

    tokenizer: Any
    template: ChatTemplate | None
    eos: int | None

    def chat(self, messages: Any) -> Example:
        """Encode a chat; the assistant's turns are trained."""
        _check_messages(messages)
        if self.template is None:
            raise ValueError('the model has no chat template: give "text", or another model')
        text, spans = self.template.answers(messages)
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        trained = [
            any(begin <= start < end for begin, end in spans) and stop > start
            for start, stop in encoded.offsets
        ]
        return Example(encoded.ids, trained)

    def completion(self, prompt: str, completion: str) -> Example:
        """Encode a prompt and what follows it; the latter and the end of text are trained."""
        before = self.tokenizer.encode(prompt).ids
        after = self.tokenizer.encode(completion, add_special_tokens=False).ids + self._end
        return Example(before + after, [False] * len(before) + [True] * len(after))

    def text(self, text: str) -> Example:
        """Encode a text, all of it trained, its end too."""
        ids = self.tokenizer.encode(text).ids + self._end
        return Example(ids, [True] * len(ids))

    @property
    def _end(self) -> list[int]:
        return [] if self.eos is None else [self.eos]


def read_examples(file: Path, encoder: Encoder) -> list[Example]:
    """Read and encode every line; empty lines are passed over.

    Raises:
        ValueError: no such file, no line in it, or a line that is wrong: file and line are named.
    """
    examples = []
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    examples.append(_example(line, f"{file}, line {number}", encoder))
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"data={str(file)!r} is not a file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None
    if not examples:
        raise ValueError(f"{file} has no lines")
    return examples


def _example(line: str, where: str, encoder: Encoder) -> Example:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be a JSON object with {KINDS}")
    try:
        return _encode(record, encoder)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _encode(record: Mapping[str, Any], encoder: Encoder) -> Example:
    kinds: dict[tuple[str, ...], Callable[..., Example]] = {
        ("messages",): encoder.chat,
        ("prompt", "completion"): encoder.completion,
        ("text",): encoder.text,
    }
    found = [keys for keys in kinds if all(key in record for key in keys)]
    if len(found) != 1:
        raise ValueError(f"must have either {KINDS}; it has {sorted(record)}")
    values = [record[key] for key in found[0]]
    for key, value in zip(found[0], values, strict=True):
        if key != "messages" and not isinstance(value, str):
            raise ValueError(f"{key!r} must be a string, got {type(value).__name__}")
    return kinds[found[0]](*values)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" must be a list with at least one message')
    for i, message in enumerate(messages, 1):
        strings = ("role", "content")
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in strings
        ):
            raise ValueError(f'message {i} must have "role" and "content", both strings')
