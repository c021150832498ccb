"""The golden Llamas, loaded once for all tests that read them."""

import functools
import pathlib

import numpy as np

import qjax.hf

FOLDER = pathlib.Path(__file__).parent.parent / "golden" / "hf"
FAMILIES = ("llama", "llama_tied")
PADDINGS = ("", "_left", "_right")
# Absolute, on logits of size 10 to 17: twenty times what float32 differs from float64 by
# (golden/hf/README.md).
TOLERANCE = 2e-4


@functools.cache
def reference(family: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / family / "ref.npz") as arrays:
        return dict(arrays)


@functools.cache
def golden_model(family: str, scan_layers: bool = False):
    """Shared between tests: do not change it."""
    return qjax.hf.from_pretrained(FOLDER / family / "hf", scan_layers=scan_layers)
