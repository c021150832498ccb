"""A run: model and data in, an adapter that PEFT loads out, and a folder that can go on."""

import dataclasses
import hashlib
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console

import qjax
from qjax.finetune.packing import Packed, pack
from qjax.finetune.plot import plot_losses
from qjax.finetune.progress import show_progress
from qjax.finetune.records import Encoder, read_examples
from qjax.finetune.training import train
from qjax.hf.chat import load_chat_template, special_tokens, tokenizer_config
from qjax.hf.extras import write_whole
from qjax.hf.gguf import Metadata
from qjax.hf.hub import locate
from qjax.models import CausalLM


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the result of a run; a run goes on only with the same.

    Attributes:
        model: folder, .gguf file or name on the hub.
        data: JSONL file.
        steps: training steps; None for `epochs` over the data.
        epochs: times over the data.
        batch_size: rows in a step.
        length: tokens in a row.
        packing: several examples in a row.
        learning_rate: its peak.
        lora: the adapter.
        quantize: dense layers to NF4, unless the checkpoint has them in 4 bits already.
        seed: of the adapter, dropout and the order of the data.
    """

    model: str
    data: str
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 4
    length: int = 512
    packing: bool = True
    learning_rate: float = 2e-4
    lora: qjax.LoraConfig = qjax.LoraConfig()
    quantize: bool = True
    seed: int = 0

    def fingerprint(self) -> dict[str, Any]:
        """Return the settings as JSON, with a checksum of the data."""
        fields = dataclasses.asdict(self)
        fields |= {f"lora.{name}": value for name, value in fields.pop("lora").items()}
        fields["data_sha256"] = hashlib.sha256(Path(self.data).read_bytes()).hexdigest()
        return json.loads(json.dumps(fields))


def finetune(settings: Settings, output: Path, *, save_every: int, console: Console) -> list[float]:
    """Fine-tune, or go on with a run that ended early; return the losses of all steps.

    `output` gets `adapter/` (PEFT), `loss.png`, `losses.json`, `checkpoints/` and `run.json`.

    Raises:
        ValueError: wrong data or settings; an output folder of another run, or of a finished one.
    """
    path = locate(settings.model)
    examples = read_examples(Path(settings.data), load_encoder(path))
    data = pack(examples, settings.length, together=settings.packing)
    steps = settings.steps or math.ceil(len(data.ids) * settings.epochs / settings.batch_size)
    _claim(output, settings)
    _describe(data, len(examples), settings, console)
    model = load_model(path, settings)
    with tempfile.TemporaryDirectory() as folder:  # what PEFT has no place for shows now, not later
        qjax.save_adapter(model, folder, base_model=settings.model)
    losses = _train(model, data, steps, settings, output, save_every, console)
    qjax.save_adapter(model, output / "adapter", base_model=settings.model)
    try:
        plot_losses(losses, output / "loss.png", f"LoRA on {Path(settings.model).name}")
    except ModuleNotFoundError as error:
        console.print(f"No loss.png: {error}", markup=False)
    return losses


def load_encoder(path: Path) -> Encoder:
    """Return the tokenizer, chat template and end of text of a model's folder or .gguf file."""
    tokenizer = qjax.load_tokenizer(path)
    if path.is_file():
        eos = Metadata(path).get("tokenizer.ggml.eos_token_id", -1)
        return Encoder(tokenizer, load_chat_template(path), eos if eos >= 0 else None)
    name = special_tokens(tokenizer_config(path)).get("eos_token")
    eos = tokenizer.token_to_id(name) if name else None
    if eos is None:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        eos = config.get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) else eos
    return Encoder(tokenizer, load_chat_template(path), eos)


def load_model(path: Path, settings: Settings) -> Any:
    """Load the base, in 4 bits, its layers stacked, with a new adapter."""
    dtype = jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    config = qjax.QuantConfig(compute_dtype=dtype) if settings.quantize else None
    model: Any = qjax.from_pretrained(path, config=config, dtype=dtype, scan_layers=True)
    if not isinstance(model, CausalLM):
        raise ValueError(f"model={settings.model!r} is no decoder: only those are fine-tuned")
    model.config = dataclasses.replace(model.config, remat=True)
    lora = settings.lora
    if not settings.quantize and lora.include is None:
        lora = dataclasses.replace(lora, include="_proj$")
    source = qjax.float_weights(path, model) if lora.reads_weights else None
    return qjax.add_lora(model, lora, rngs=nnx.Rngs(settings.seed), source=source)


def _claim(output: Path, settings: Settings) -> None:
    """Write what the run is, or see that the folder is of the same one, not yet finished."""
    file, now = output / "run.json", settings.fingerprint()
    if not file.exists():
        if output.exists() and any(output.iterdir()):
            raise ValueError(f"output={str(output)!r} is not empty, and holds no run to go on with")
        output.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda f: f.write_text(json.dumps(now, indent=2)))
        return
    before = json.loads(file.read_text())
    for key in sorted(set(before) | set(now)):
        if before.get(key) != now.get(key):
            raise ValueError(
                f"output={str(output)!r} holds a run with {key}={before.get(key)!r}, not "
                f"{now.get(key)!r}: give the same, or another output"
            )
    if (output / "adapter" / "adapter_config.json").exists():
        raise ValueError(f"output={str(output)!r} holds a finished run: give another")


def _describe(data: Packed, count: int, settings: Settings, console: Console) -> None:
    used, trained = (data.segments > 0).mean(), int(data.weights.sum())
    lines = [
        f"{count:,} examples in {len(data.ids):,} rows of {settings.length} tokens, {used:.0%} "
        f"full; {trained:,} tokens to train on"
    ]
    if data.cut:
        lines.append(f"{data.cut:,} examples are longer than a row and lose their end (--length)")
    if data.empty:
        lines.append(f"{data.empty:,} examples have nothing to train on in a row: left out")
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _train(model, data, steps, settings, output, save_every, console) -> list[float]:
    run = train(
        model,
        data,
        folder=output,
        steps=steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        save_every=save_every,
        seed=settings.seed,
    )
    before = list(next(run))
    if before:
        console.print(f"Going on after step {len(before)}", highlight=False)
    tokens = settings.batch_size * settings.length
    progress = {"first": len(before), "steps": steps, "tokens": tokens, "console": console}
    return before + show_progress((losses[-1] for losses in run), **progress)
