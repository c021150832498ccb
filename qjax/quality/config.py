"""What a JSON file or a name on the command line says of how to quantize."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.config import QuantConfig


def compute_dtype(name: str | None) -> Any:
    """Return the dtype of a name; of None float32 on a CPU, and bfloat16 elsewhere."""
    return jnp.dtype(name or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))


def quant_config(format: str | None, file: Path | None, dtype: Any) -> QuantConfig | None:
    """Return the config of a format or of a JSON file with the fields of `QuantConfig`.

    Raises:
        ValueError: both, an unknown format or field, or no JSON object.
    """
    if file is None:
        return None if format is None else QuantConfig(format, compute_dtype=dtype)
    if format is not None:
        raise ValueError(f"format={format!r} and config={str(file)!r}: give one of them")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    try:
        return QuantConfig(**{"compute_dtype": dtype, **fields})
    except TypeError as error:
        raise ValueError(f"{file}: {error}") from None
