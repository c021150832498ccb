"""BitsAndBytesConfig, the `quantization_config` of a config.json, as a `QuantConfig` and back."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from qjax.core.config import QuantConfig

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


@dataclass(frozen=True)
class BnbConfig:
    """What a BitsAndBytesConfig asks for.

    Attributes:
        quant: the weights' format, with no patterns; None where it asks for 8 bits.
        skip: module names, in Hugging Face's spelling, that stay in floating point.
    """

    quant: QuantConfig | None
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
            f"{where}: quant_method={method!r} is not read; only 'bitsandbytes'"
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
    if eight:
        return BnbConfig(None, skip)
    try:
        quant = QuantConfig(
            format=data["bnb_4bit_quant_type"],
            double_quant=data["bnb_4bit_use_double_quant"],
            compute_dtype=jnp.dtype(data["bnb_4bit_compute_dtype"]),
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
    return BnbConfig(quant, skip)


def write_bnb_config(
    format: str, double_quant: bool, compute_dtype: Any, skip: list[str] | None
) -> dict[str, Any]:
    """Return the `quantization_config` of a 4-bit checkpoint."""
    return _DEFAULTS | {
        "_load_in_4bit": True,
        "load_in_4bit": True,
        "bnb_4bit_compute_dtype": jnp.dtype(compute_dtype).name,
        "bnb_4bit_quant_type": format,
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_skip_modules": skip,
    }


def is_skipped(module: str, skip: tuple[str, ...] | None) -> bool:
    """Whether a module's name, such as "model.layers.0.mlp", is in a list of modules to skip.

    As transformers 5 does: an entry is a pattern of the name's beginning, or is its end.
    """
    return any(re.match(rf"(?:{key})(\.|$)", module) or module.endswith(key) for key in skip or ())
