"""Broken files are errors that say so: never another exception, a crash or a hang."""

import json

import gguf
import numpy as np
import pytest

import qjax.hf
from tests.hf.gguf_files import write_model
from tests.models.golden import write_bnb

VALUES = (None, -1, 0, 1, 7, 10**12, 0.5, float("inf"), True, "", "x", "64", [], [1], {}, {"a": 1})

SEEDS = {"llama": 1, "gpt2": 2, "gemma3": 3, "t5": 4, "gpt_oss": 5}


def mutate_json(rng, data):
    key = rng.choice(sorted(data))
    if isinstance(data[key], dict) and data[key] and rng.random() < 0.7:
        mutate_json(rng, data[key])
    elif rng.random() < 0.2:
        del data[key]
    else:
        data[key] = VALUES[rng.integers(len(VALUES))]


def mutate_bytes(rng, data: bytes) -> bytes:
    changed = bytearray(data)
    header = 8 + int.from_bytes(data[:8], "little")
    # Most of the harm is in the length and the header.
    end = len(data) if rng.random() < 0.1 else header if rng.random() < 0.8 else 8
    for _ in range(rng.integers(1, 4)):
        changed[rng.integers(end)] = rng.integers(256)
    return bytes(changed[: rng.integers(len(data))] if rng.random() < 0.1 else changed)


@pytest.mark.property
@pytest.mark.parametrize("family", SEEDS)
def test_100_broken_checkpoints(family, tmp_path):
    folder = write_bnb(family, tmp_path)
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    rng = np.random.default_rng(SEEDS[family])
    refused = 0
    for _ in range(100):
        data = json.loads(text)
        if rng.random() < 0.5:
            mutate_json(rng, data)
            weights.write_bytes(whole)
        else:
            weights.write_bytes(mutate_bytes(rng, whole))
        config.write_text(json.dumps(data))
        try:
            qjax.hf.from_pretrained(folder)
        except (ValueError, NotImplementedError):
            refused += 1
    assert refused > 40


@pytest.mark.property
@pytest.mark.parametrize("family, kind, seed", [("gemma2", "Q8_0", 6), ("mixtral", "F16", 7)])
def test_100_broken_gguf_files(family, kind, seed, tmp_path):
    path = tmp_path / "model.gguf"
    write_model(path, family, gguf.GGMLQuantizationType[kind])
    whole = path.read_bytes()
    head = whole.rindex(b"blk.1.") + 64
    rng = np.random.default_rng(seed)
    refused = 0
    for _ in range(100):
        changed = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            changed[rng.integers(head)] = rng.integers(256)
        path.write_bytes(changed[: rng.integers(len(changed))] if rng.random() < 0.1 else changed)
        try:
            qjax.hf.from_pretrained(path)
        except (ValueError, NotImplementedError):
            refused += 1
    assert refused > 40
