"""`qjax finetune`: what a run leaves, and that it goes on exactly where it was killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from typer.testing import CliRunner

import qjax
from qjax.cli import app
from qjax.finetune.packing import pack
from qjax.finetune.records import Encoder, read_examples
from qjax.finetune.training import weighted_loss
from qjax.hf.chat import ChatTemplate
from tests.finetune.folders import CHATML, CHATS, make_folder, make_tokenizer, write_lines
from tests.models.golden import golden_model

SMALL = ["--length", "64", "--batch-size", "2", "--rank", "4", "--learning-rate", "0.01"]


@pytest.fixture
def inputs(tmp_path):
    return make_folder(tmp_path / "model"), write_lines(tmp_path / "data.jsonl", *CHATS)


def run(inputs, output, *options):
    model, data = map(str, inputs)
    arguments = ["finetune", model, "--data", data, "--output", str(output), *SMALL, *options]
    return CliRunner().invoke(app, arguments)


@pytest.mark.slow
def test_packed_texts_have_the_loss_that_they_have_alone(tmp_path):
    """Mean over all trained tokens, each text in a row of its own: no text sees another."""
    encoder = Encoder(make_tokenizer(), ChatTemplate(CHATML), 2)
    examples = read_examples(write_lines(tmp_path / "data.jsonl", *CHATS[:4]), encoder)
    model = golden_model("llama")
    packed = pack(examples, 60)
    assert len(packed.ids) == 2 and packed.segments.max() == 2
    loss = weighted_loss(model, packed.ids, packed.targets, packed.weights, packed.segments)
    alone = pack(examples, max(len(e.ids) for e in examples) - 1, together=False)
    expected = weighted_loss(model, alone.ids, alone.targets, alone.weights)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)  # float32 sums in another order


@pytest.mark.slow
def test_a_run_leaves_an_adapter_that_learned(inputs, tmp_path):
    output = tmp_path / "out"
    options = ("--steps", "12", "--save-every", "5", "--dropout", "0.1")
    result = run(inputs, output, *options)
    assert result.exit_code == 0, result.output
    assert "12 examples in" in result.output and "tokens to train on" in result.output
    losses = json.loads((output / "losses.json").read_text())
    assert len(losses) == 12 and np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    assert (output / "loss.png").stat().st_size > 1000
    kept = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert kept == ["step-000010", "step-000012"]
    model = qjax.from_pretrained(inputs[0], config=qjax.QuantConfig())
    base = np.asarray(model(np.ones((1, 8), np.int32)))
    model = qjax.load_adapter(model, output / "adapter")
    assert np.abs(np.asarray(model(np.ones((1, 8), np.int32))) - base).max() > 0.1
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(inputs[0]) and config["r"] == 4
    assert "holds a finished run" in run(inputs, output, *options).output
    other = run(inputs, output, *options, "--dora").output
    assert "holds a run with lora.dora=False, not True: give the same, or another" in other


@pytest.mark.slow
def test_a_run_of_texts_from_loftq_with_dora(inputs, tmp_path):
    data = write_lines(tmp_path / "text.jsonl", *({"text": f"{a} {a}"} for a in range(40)))
    options = ("--dora", "--init", "loftq", "--no-packing", "--include", "self_attn")
    result = run((inputs[0], data), tmp_path / "out", *options, "--epochs", "0.1")
    assert result.exit_code == 0, result.output
    assert "40 examples in 40 rows" in result.output and "2 steps, last loss" in result.output
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["use_dora"] and config["target_modules"] == [
        "k_proj",
        "o_proj",
        "q_proj",
        "v_proj",
    ]


def test_misuse_is_one_line(inputs, tmp_path):
    model, data = inputs
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": ')
    for arguments, message in (
        ((model, broken), "broken.jsonl, line 2 is not JSON"),
        ((tmp_path / "nothing", data), "is no model folder, .gguf file or hub id"),
        ((make_folder(tmp_path / "plain", template=None), data), "has no chat template"),
    ):
        result = run(arguments, tmp_path / "out")
        assert result.exit_code == 1 and message in result.output.replace("\n", "")
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("mine")
    assert "is not empty, and holds no run" in run(inputs, tmp_path / "out").output
    (tmp_path / "out" / "letter.txt").unlink()
    (tmp_path / "out" / "run.json").write_text('{"seed": 3}')
    assert "holds a run with" in run(inputs, tmp_path / "out").output


def test_help_says_what_a_newcomer_needs():
    output = CliRunner().invoke(app, ["finetune", "--help"], env={"COLUMNS": "200"}).output
    text = re.sub(r"[\s│]+", " ", output)
    for words in ("--data", "messages", "--output", "goes on when the same command", "--length"):
        assert words in text


@pytest.mark.process
def test_a_killed_run_goes_on_to_the_same_losses(inputs, tmp_path):
    """kill -9 between two checkpoints; dropout draws and the order of the data go on too."""
    options = ["--steps", "40", "--save-every", "4", "--dropout", "0.2"]
    model, data = map(str, inputs)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

    def command(output):
        arguments = ["finetune", model, "--data", data, "--output", str(output), *SMALL, *options]
        return [sys.executable, "-m", "qjax.cli", *arguments]

    def finish(output):
        done = subprocess.run(command(output), capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, json.loads((output / "losses.json").read_text())

    killed = tmp_path / "killed"
    process = subprocess.Popen(command(killed), env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (killed / "checkpoints" / "step-000008" / "_CHECKPOINT_METADATA").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "adapter").exists()
    said, losses = finish(killed)
    assert "Going on after step" in said
    _, expected = finish(tmp_path / "whole")
    assert losses == expected and len(losses) == 40
