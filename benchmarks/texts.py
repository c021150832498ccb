"""Text that every Python has, for calibration, training and measuring: the topics of `help()`."""

import pydoc_data.topics
from collections.abc import Callable

import numpy as np

Encode = Callable[[str], list[int]]


def documents(held_out: bool) -> list[str]:
    """Return every fourth topic, or the others."""
    topics = pydoc_data.topics.topics
    return [topics[n] for i, n in enumerate(sorted(topics)) if (i % 4 == 0) == held_out]


def rows(encode: Encode, length: int, held_out: bool) -> np.ndarray:
    """Return all texts one after the other as int32 [rows, length], without padding."""
    ids = [token for text in documents(held_out) for token in encode(text)]
    return np.asarray(ids[: len(ids) // length * length], np.int32).reshape(-1, length)


def draw(pool: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return `count` rows of a pool, by chance."""
    return pool[np.random.default_rng(seed).choice(len(pool), count, replace=False)]
