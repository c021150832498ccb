"""QuantConfig: what to quantize and how, as one frozen value."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from qjax.core.codebook import codebook

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_OVERRIDABLE = ("format", "block_size", "double_quant", "compute_dtype")


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How weights are quantized, and which.

    Patterns are `re.search`ed in the "/"-joined path of a weight, such as `layers/0/attn/q/kernel`.

    Attributes:
        format: "nf4" or "fp4".
        block_size: weights that share a scale, a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits (QLoRA section 3): 4.13 bits a weight, not 4.5.
        compute_dtype: the dtype that layers multiply in.
        include: pattern or patterns; only paths that match one are quantized. None: the defaults.
        exclude: pattern or patterns of paths to leave alone, on top of the defaults.
        overrides: pattern -> dict of the fields above, as a mapping or pairs; the first match wins.

    Raises:
        ValueError: a field is out of range, a pattern is not a regular expression, or an override
            names an unknown field.

    Example:
        >>> cfg = QuantConfig(overrides={"down_proj": {"block_size": 128}})
        >>> cfg.at("layers/0/down_proj/kernel").block_size
        128
    """

    format: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    compute_dtype: Any = jnp.bfloat16
    include: str | Iterable[str] | None = None
    exclude: str | Iterable[str] | None = None
    overrides: Mapping[str, Mapping[str, Any]] | Iterable[tuple[str, Mapping[str, Any]]] = ()

    def __post_init__(self):
        codebook(self.format)
        if isinstance(self.block_size, bool) or self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {self.block_size!r}")
        if not isinstance(self.double_quant, bool):
            raise TypeError(f"double_quant must be True or False, got {self.double_quant!r}")
        dtype = jnp.dtype(self.compute_dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"compute_dtype must be a floating dtype, got {dtype}")
        self._set("compute_dtype", dtype)
        self._set("include", patterns("include", self.include))
        self._set("exclude", patterns("exclude", self.exclude))
        self._set("overrides", overrides(self.overrides, _OVERRIDABLE))
        for pattern, fields in self.overrides:
            try:
                self._replace(fields)
            except (ValueError, TypeError) as error:
                raise ValueError(f"overrides[{pattern!r}]: {error}") from None

    def _set(self, name: str, value):
        object.__setattr__(self, name, value)

    def _replace(self, fields) -> "QuantConfig":
        return dataclasses.replace(self, overrides=(), **dict(fields))

    def at(self, path: str) -> "QuantConfig":
        """Return the config for the weight at `path`: the first matching override applied."""
        for pattern, fields in self.overrides:
            if re.search(pattern, path):
                return self._replace(fields)
        return dataclasses.replace(self, overrides=())


def patterns(name: str, value) -> tuple[str, ...] | None:
    """Return a pattern argument as a tuple of regular expressions, checked; None stays None."""
    if value is None:
        return None
    value = (value,) if isinstance(value, str) else tuple(value)
    for pattern in value:
        if not isinstance(pattern, str):
            raise TypeError(f"{name} must hold strings, got {pattern!r}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name}: {pattern!r} is no regular expression: {error}") from None
    return value


def overrides(value, known: tuple[str, ...]) -> tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]:
    """Return an `overrides` argument as pairs, hashable; its fields must be among the known."""
    pairs = value.items() if isinstance(value, Mapping) else value
    result = []
    for pattern, fields in pairs:
        patterns("overrides", pattern)
        fields = dict(fields)
        if unknown := sorted(set(fields) - set(known)):
            raise ValueError(f"overrides[{pattern!r}] has unknown fields {unknown}; known: {known}")
        result.append((pattern, tuple(sorted(fields.items()))))
    return tuple(result)
