"""The golden models, each loaded once for all tests that read it."""

import functools
import pathlib
import shutil

import numpy as np
from safetensors.numpy import load_file, save_file

import qjax.hf
from qjax.models import ModelConfig

FOLDER = pathlib.Path(__file__).parent.parent / "golden" / "hf"
LLAMAS = ("llama", "llama_tied")
DECODERS = (
    *LLAMAS,
    *("mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"),
    *("gpt2", "opt", "opt_postnorm", "bloom", "gpt_neo", "gpt_neox", "mixtral", "gpt_oss"),
)
SEQ2SEQ = ("t5", "t5_gated")
FAMILIES = (*DECODERS, *SEQ2SEQ, "bert")
PADDINGS = ("", "_left", "_right")
# Absolute, on logits of size 10 to 17: twenty times what float32 differs from float64 by
# (golden/hf/README.md).
TOLERANCE = 2e-4

# A config, for what needs no golden data.
TINY = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)


@functools.cache
def reference(family: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / family / "ref.npz") as arrays:
        return dict(arrays)


@functools.cache
def golden_model(family: str, scan_layers: bool = False):
    """Shared between tests: do not change it."""
    return qjax.hf.from_pretrained(FOLDER / family / "hf", scan_layers=scan_layers)


def error(logits, expected: np.ndarray) -> np.ndarray:
    """Return the absolute errors of logits, of which the golden data may hold every fourth."""
    return np.abs(np.asarray(logits)[..., :: logits.shape[-1] // expected.shape[-1]] - expected)


def write_bnb(family: str, folder: pathlib.Path) -> pathlib.Path:
    """Write the golden bitsandbytes checkpoint of a family, whole (golden/hf/README.md)."""
    tensors = load_file(FOLDER / family / "bnb" / "quantized.safetensors")
    floats = load_file(FOLDER / family / "hf" / "model.safetensors")
    save_file({**floats, **tensors}, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(FOLDER / family / "bnb" / "config.json", folder)
    return folder
