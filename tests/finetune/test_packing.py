"""Rows of examples: each whole in one place, and batches that depend on the step alone."""

import numpy as np
import pytest

from qjax.finetune.packing import pack
from qjax.finetune.records import Example

LENGTHS = (5, 9, 3, 12, 7, 2, 9, 30)


@pytest.fixture
def examples(rng):
    """Tokens that are all different, so that each can be found again."""
    tokens = iter(range(1, 1000))
    return [
        Example([next(tokens) for _ in range(n)], [i >= n // 2 for i in range(n)]) for n in LENGTHS
    ]


@pytest.mark.parametrize("together", [True, False])
def test_every_example_is_whole_in_one_segment(examples, together):
    data = pack(examples, 16, together=together)
    assert data.cut == 1 and data.empty == 0
    assert len(data.ids) < len(examples) if together else len(data.ids) == len(examples)
    found = {}
    for row in range(len(data.ids)):
        for number in range(1, data.segments[row].max() + 1):
            at = data.segments[row] == number
            ids = data.ids[row, at]
            np.testing.assert_array_equal(data.targets[row, at][:-1], ids[1:])
            found[ids[0]] = (ids, data.targets[row, at], data.weights[row, at])
    assert len(found) == len(examples)
    for example in examples:
        ids, targets, weights = found[example.ids[0]]
        size = min(len(example.ids) - 1, 16)
        assert ids.tolist() == example.ids[:size] and targets[-1] == example.ids[size]
        assert weights.tolist() == example.trained[1 : size + 1]
    padding = data.segments == 0
    assert not (data.weights[padding].any() or data.ids[padding].any())


def test_a_batch_is_a_function_of_its_step_and_an_epoch_of_all_rows(examples):
    data = pack(examples, 16, together=False)
    batches = [data.batch(step, 3, seed=5) for step in range(16)]
    firsts = [ids[:, 0].tolist() for ids, *_ in batches]
    for step in (0, 5, 15):
        for again, before in zip(data.batch(step, 3, seed=5), batches[step], strict=True):
            np.testing.assert_array_equal(again, before)
    order = [first for batch in firsts for first in batch]
    epochs = [order[i : i + 8] for i in range(0, 48, 8)]
    assert all(sorted(epoch) == sorted(e.ids[0] for e in examples) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert firsts[0] != data.batch(0, 3, seed=6)[0][:, 0].tolist()


def test_what_has_nothing_to_train_is_left_out_and_counted():
    silent = Example([1, 2, 3], [False] * 3)
    late = Example(list(range(10)), [False] * 9 + [True])
    good = Example([4, 5], [True, True])
    data = pack([silent, late, good], 4)
    assert (data.cut, data.empty, len(data.ids)) == (1, 2, 1)
    with pytest.raises(ValueError, match="no example has a token to train on within 4 tokens"):
        pack([silent, late], 4)
