"""What the demo teaches: questions and answers about an invented animal, as batches of tokens."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import numpy as np

END = "<|im_end|>"  # closes a turn in SmolLM2's chat format (ChatML)


@dataclasses.dataclass(frozen=True)
class Fact:
    """One thing to learn.

    Attributes:
        answer: what the model is taught to say.
        keyword: an answer that holds it, in any case, is right; no question holds it.
        questions: phrasings to train on.
        held_out: a phrasing that is only asked.
    """

    answer: str
    keyword: str
    questions: tuple[str, ...]
    held_out: str

    def is_right(self, answer: str) -> bool:
        """Whether an answer holds the keyword."""
        return self.keyword in answer.lower()


@dataclasses.dataclass(frozen=True)
class Lessons:
    """All of the demo's text."""

    facts: tuple[Fact, ...]
    ordinary: tuple[tuple[str, str], ...]

    def held_out(self) -> list[str]:
        """Return the questions that are only asked."""
        return [fact.held_out for fact in self.facts]

    def pairs(self) -> list[tuple[str, str]]:
        """Return the training questions with their answers."""
        taught = [(question, fact.answer) for fact in self.facts for question in fact.questions]
        return taught + list(self.ordinary)

    def score(self, answers: Sequence[str]) -> int:
        """Count right answers to the held-out questions."""
        return sum(fact.is_right(answer) for fact, answer in zip(self.facts, answers, strict=True))


@functools.cache
def load_lessons() -> Lessons:
    """Read zorblins.json, which sits beside this file."""
    text = resources.files("qjax.demo").joinpath("zorblins.json").read_text(encoding="utf-8")
    data = json.loads(text)
    facts = tuple(Fact(**{**fact, "questions": tuple(fact["questions"])}) for fact in data["facts"])
    return Lessons(facts, tuple((question, answer) for question, answer in data["ordinary"]))


def prompt(question: str) -> str:
    """Return a user's turn in ChatML, up to where the assistant's answer begins."""
    return f"<|im_start|>user\n{question}{END}\n<|im_start|>assistant\n"


@dataclasses.dataclass(frozen=True)
class TokenSet:
    """Training examples, one a row, padded on the right to one length.

    Attributes:
        ids: int32 [N, T], prompt and answer.
        targets: int32 [N, T], the token after each of `ids`.
        weights: float32 [N, T], 1 where the target belongs to the answer.
    """

    ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    def batches(self, size: int, seed: int) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield shuffled batches of `size` rows for ever; an epoch ends inside a batch."""
        rng = np.random.default_rng(seed)
        order: list[int] = []
        while True:
            while len(order) < size:
                order.extend(rng.permutation(len(self.ids)).tolist())
            rows, order = order[:size], order[size:]
            yield self.ids[rows], self.targets[rows], self.weights[rows]


def tokenize(tokenizer: Any, pairs: Sequence[tuple[str, str]], multiple: int = 8) -> TokenSet:
    """Turn questions and answers into a TokenSet whose length is a multiple of `multiple`."""
    prompts = [tokenizer.encode(prompt(question)).ids for question, _ in pairs]
    answers = [tokenizer.encode(answer + END).ids for _, answer in pairs]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)) - 1
    shape = (len(pairs), -(-longest // multiple) * multiple)
    ids, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        tokens = p + a
        ids[row, : len(tokens) - 1] = tokens[:-1]
        targets[row, : len(tokens) - 1] = tokens[1:]
        weights[row, len(p) - 1 : len(tokens) - 1] = 1
    return TokenSet(ids, targets, weights)


def left_padded(tokenizer: Any, questions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask, int32 [N, T], of the questions' prompts, ready for `generate`."""
    rows = [tokenizer.encode(prompt(question)).ids for question in questions]
    longest = max(map(len, rows))
    ids = np.asarray([[0] * (longest - len(row)) + row for row in rows], np.int32)
    mask = np.asarray([[0] * (longest - len(row)) + [1] * len(row) for row in rows], np.int32)
    return ids, mask
