"""The demo: a real model in 4 bits, asked, fine-tuned, asked again, saved and reloaded."""

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table
from rich.text import Text

import qjax
from qjax.demo import model as demo_model
from qjax.demo.finetune import finetune
from qjax.demo.lessons import Lessons, TokenSet, load_lessons, tokenize
from qjax.finetune.plot import plot_losses
from qjax.finetune.progress import show_progress

_PROCESSES = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
BATCH_SIZE = 8
LEARNING_RATE = 1e-3


class DemoError(Exception):
    """The demo ran, but did not show what it promises."""


def run(output: Path, *, steps: int, console: Console) -> None:
    """Run the demo and leave adapters, the loss curve and a summary in `output`.

    Raises:
        DemoError: fewer than four right answers after training, more than one before, or other
            tokens after reloading.
        ModuleNotFoundError: with what to install.
    """
    started = time.perf_counter()
    weights = demo_model.weights_file()
    output.mkdir(parents=True, exist_ok=True)
    console.rule("1. Load SmolLM2-135M-Instruct")
    with console.status(f"Reading {weights.name} ..."):
        tokenizer = qjax.load_tokenizer(weights)
        model: Any = demo_model.load_float()
    console.print(f"{parameters(model):,} parameters from {weights}")

    console.rule("2. Quantize its linear layers to NF4")
    model = _quantize(model, console)

    console.rule("3. Ask the 4-bit model")
    lessons = load_lessons()
    _, before = _ask(model, tokenizer, lessons, console)

    console.rule("4. Fine-tune LoRA adapters on what it cannot know")
    model = qjax.add_lora(model, demo_model.lora_config(), rngs=nnx.Rngs(0))
    losses = _train(model, tokenize(tokenizer, lessons.pairs()), steps, console)
    plot_losses(losses, output / "loss.png", "LoRA on NF4 SmolLM2-135M")

    console.rule("5. Ask again: questions that it was not trained on")
    tokens, after = _ask(model, tokenizer, lessons, console)
    console.print(_answers(lessons, before, after))

    console.rule("6. Save the adapters, reload them in a new process")
    reloaded = _save_and_reload(model, output / "adapters", console)
    summary = {
        "right_before": lessons.score(before),
        "right_after": lessons.score(after),
        "same_tokens_after_reloading": np.array_equal(tokens, reloaded),
        "losses": losses,
        "seconds": round(time.perf_counter() - started, 1),
        # KiB on Linux; the new process is measured too.
        "peak_bytes": 1024 * max(resource.getrusage(who).ru_maxrss for who in _PROCESSES),
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2))
    console.print(_verdict(summary, output), markup=False)
    if not _as_promised(summary):
        raise DemoError(f"not as promised, see {output / 'summary.json'}")


def _ask(
    model: Any, tokenizer: Any, lessons: Lessons, console: Console
) -> tuple[np.ndarray, list[str]]:
    """Print the answer to the greeting; return all tokens, and the other answers."""
    with console.status("Compiling and answering ..."):
        tokens, (greeting, *answers) = demo_model.ask(
            model, tokenizer, [demo_model.GREETING, *lessons.held_out()]
        )
    console.print(Text.assemble((demo_model.GREETING, "bold"), "  ", greeting))
    return tokens, answers


def _quantize(model: Any, console: Console) -> Any:
    parts = {"layers": model.layers, "embeddings": model.embed_tokens, "whole model": model}
    sizes = {name: parameters(part) for name, part in parts.items()}
    floats = {name: qjax.memory_footprint(part) for name, part in parts.items()}
    with console.status("Quantizing ..."):
        model = qjax.quantize_model(model, demo_model.quant_config())
    # The surgery is in place: the parts are still the model's own.
    packed = {name: qjax.memory_footprint(part) for name, part in parts.items()}
    float_bytes = f"{demo_model.dtype().name} bytes"
    table = Table("", "parameters", float_bytes, "NF4 bytes", "bits/param", "ratio")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, size in sizes.items():
        table.add_row(
            name,
            f"{size:,}",
            f"{floats[name]:,}",
            f"{packed[name]:,}",
            f"{8 * packed[name] / size:.3f}",
            f"{floats[name] / packed[name]:.1f}x",
        )
    console.print(table, "Embeddings, which serve as the output head too, and norms stay in float.")
    return model


def parameters(module: nnx.Module, kind: type = nnx.Param) -> int:
    """Count the parameters of one kind of variable."""
    return sum(leaf.size for _, leaf in nnx.to_flat_state(nnx.state(module, kind)))


def _train(model: Any, data: TokenSet, steps: int, console: Console) -> list[float]:
    trainable = parameters(model, nnx.LoRAParam)
    console.print(
        f"{len(data.ids)} questions and answers, {trainable:,} trainable parameters, {steps} steps "
        f"of {BATCH_SIZE} x {data.ids.shape[1]} tokens"
    )
    run = finetune(model, data, steps=steps, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE)
    tokens = BATCH_SIZE * data.ids.shape[1]
    return show_progress(run, first=0, steps=steps, tokens=tokens, console=console)


def _answers(lessons: Lessons, before: Sequence[str], after: Sequence[str]) -> Table:
    table = Table("question", "before", "after", "", show_lines=True)
    for fact, old, new in zip(lessons.facts, before, after, strict=True):
        verdict = "right" if fact.is_right(new) else "wrong"
        table.add_row(*(Text(cell) for cell in (fact.held_out, old, new, verdict)))
    return table


def _save_and_reload(model: Any, folder: Path, console: Console) -> np.ndarray:
    if folder.exists():
        shutil.rmtree(folder)  # of an earlier run
    qjax.save(folder, model, only="adapters")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    console.print(f"Adapters: {folder}, {size:,} bytes")
    command = [sys.executable, "-m", "qjax.demo.reload", str(folder)]
    with console.status("The new process loads, quantizes, restores and answers ..."):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise DemoError(f"the new process failed:\n{result.stderr}")
    return np.asarray(json.loads(result.stdout.splitlines()[-1]), np.int32)


def _verdict(summary: dict[str, Any], output: Path) -> str:
    same = "the same" if summary["same_tokens_after_reloading"] else "OTHER"
    return (
        f"Right answers: {summary['right_before']} of 5 before, {summary['right_after']} after; "
        f"{same} tokens after reloading. {summary['seconds']:.0f} s, "
        f"peak memory {summary['peak_bytes'] / 2**30:.1f} GiB. Loss curve: {output / 'loss.png'}"
    )


def _as_promised(summary: dict[str, Any]) -> bool:
    return (
        summary["right_before"] <= 1
        and summary["right_after"] >= 4
        and summary["same_tokens_after_reloading"]
    )
