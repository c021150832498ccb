"""BitsAndBytesConfig, the `quantization_config` of a config.json, as a `QuantConfig` and back."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from qjax.core.config import QuantConfig
from qjax.core.qtensor import QTensor

# Keys of transformers 5.23's BitsAndBytesConfig, with its defaults, in the order of config.json.
_DEFAULTS: dict[str, Any] = {
    "_load_in_4bit": False,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
    "load_in_4bit": False,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}


FORMATS_4BIT = ("nf4", "fp4")


@dataclass(frozen=True)
class BnbConfig:
    """What a BitsAndBytesConfig asks for.

    Attributes:
        quant: the weights' format, with no patterns.
        skip: module names, in Hugging Face's spelling, that stay in floating point.
    """

    quant: QuantConfig
    skip: tuple[str, ...] | None


def read_bnb_config(data: Mapping[str, Any], where: str = "quantization_config") -> BnbConfig:
    """Read a BitsAndBytesConfig dict.

    Raises:
        NotImplementedError: another quant_method.
        ValueError: unknown keys, a value out of range, or neither 4 nor 8 bits (or both).
    """
    method = data.get("quant_method", "bitsandbytes")
    if getattr(method, "value", method) != "bitsandbytes":
        raise NotImplementedError(
            f"{where}: quant_method={method!r} is not read; only 'bitsandbytes', "
            "and of checkpoints in them 'gptq', 'awq' and 'mxfp4'"
        )
    if unknown := sorted(set(data) - set(_DEFAULTS)):
        raise ValueError(f"{where} has unknown keys {unknown}; known: {sorted(_DEFAULTS)}")
    data = {**_DEFAULTS, **data}
    four, eight = data["load_in_4bit"], data["load_in_8bit"]
    if bool(four) == bool(eight):
        raise ValueError(
            f"{where}: load_in_4bit={four!r} and load_in_8bit={eight!r}; one must be true"
        )
    skip = data["llm_int8_skip_modules"]
    skip = None if skip is None else tuple(skip)
    try:
        quant = _int8(data) if eight else _four_bit(data)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
    return BnbConfig(quant, skip)


def _four_bit(data: Mapping[str, Any]) -> QuantConfig:
    if data["bnb_4bit_quant_type"] not in FORMATS_4BIT:
        raise ValueError(
            f"bnb_4bit_quant_type={data['bnb_4bit_quant_type']!r} must be one of {FORMATS_4BIT}"
        )
    return QuantConfig(
        format=data["bnb_4bit_quant_type"],
        double_quant=data["bnb_4bit_use_double_quant"],
        compute_dtype=jnp.dtype(data["bnb_4bit_compute_dtype"]),
    )


def _int8(data: Mapping[str, Any]) -> QuantConfig:
    """LLM.int8(), which multiplies in float16; a threshold of 0 looks for no outliers."""
    threshold = data["llm_int8_threshold"] or math.inf
    return QuantConfig(format="int8", int8_threshold=threshold, compute_dtype=jnp.float16)


def write_bnb_config(q: QTensor, compute_dtype: Any, skip: list[str] | None) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint with weights like this one."""
    common = _DEFAULTS | {"llm_int8_skip_modules": skip}
    if q.format == "int8":
        threshold = q.int8_threshold or 0.0
        found = 0.0 if math.isinf(threshold) else threshold
        return common | {
            "_load_in_8bit": True, "load_in_8bit": True, "llm_int8_threshold": found
        }  # fmt: skip
    return common | {
        "_load_in_4bit": True,
        "load_in_4bit": True,
        "bnb_4bit_compute_dtype": jnp.dtype(compute_dtype).name,
        "bnb_4bit_quant_type": q.format,
        "bnb_4bit_use_double_quant": q.double_quant,
    }


def is_skipped(module: str, skip: tuple[str, ...] | None) -> bool:
    """Whether a module's name, such as "model.layers.0.mlp", is in a list of modules to skip.

    As transformers 5 does: an entry is a pattern of the name's beginning, or is its end.
    """
    return any(re.match(rf"(?:{key})(\.|$)", module) or module.endswith(key) for key in skip or ())
