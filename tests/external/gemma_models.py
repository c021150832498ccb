"""Models of google-deepmind/gemma (Linen) in 4 bits: logits, training, saving, bytes.

Not part of `make test`: gemma brings many packages. In an environment of its own:

    python3.12 -m venv /tmp/gemma && . /tmp/gemma/bin/activate
    pip install . 'gemma==4.0.1' 'sentencepiece==0.2.0'
    PYTHONPATH=. python -W ignore tests/external/gemma_models.py [model ...]
"""

import dataclasses
import sys

import jax.numpy as jnp
from gemma import gm

from tests.external.common import check_linen

IDS = jnp.arange(16).reshape(2, 8)
SIZES = {"num_embed": 256, "embed_dim": 64, "hidden_dim": 128, "num_heads": 4, "head_dim": 32}


def build(cls, layers=2, **more):
    config = cls.config
    types = config.attention_types[:layers]
    return cls(
        config=dataclasses.replace(config, **SIZES, attention_types=types, **more),
        dtype=jnp.float32,
    )


MODELS = {
    "gemma3_1b": lambda: build(gm.nn.Gemma3_1B, num_kv_heads=1),
    "gemma2_2b": lambda: build(gm.nn.Gemma2_2B, num_kv_heads=2),
    "gemma2_qkv": lambda: build(gm.nn.Gemma2_2B, num_kv_heads=4),
}


def main(names):
    for name, make in MODELS.items():
        if not names or name in names:
            check_linen(name, make(), IDS)


if __name__ == "__main__":
    main(sys.argv[1:])
