"""QuantConfig: what to quantize and how, as one frozen value."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from qjax.core.formats import Format, format_of

_OVERRIDABLE = ("format", "block_size", "double_quant", "compute_dtype", "int8_threshold")


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How weights are quantized, and which.

    Patterns are `re.search`ed in the "/"-joined path of a weight, such as `layers/0/attn/q/kernel`.
    Where they are used, an include pattern that matches nothing is an error, any other a warning.

    Attributes:
        format: 4 bits: "nf4", "fp4" (bitsandbytes' table), "fp4_e2m1", "int4", "int4_asym" (with
            zero points), "mxfp4", "nvfp4", or one of `qjax.register_format`. 8 bits: "int8",
            "fp8_e4m3", "fp8_e5m2", with a scale for each output.
        block_size: weights that share a scale, a power of two from 32 to 4096; 64 by default. Some
            formats fix it: "mxfp4" (32), "nvfp4" (16), and those of 8 bits (None: a row).
        double_quant: store the scales in 8 bits (QLoRA section 3): 4.13 bits a weight, not 4.5. The
            default where a float32 scale a block can be so stored.
        compute_dtype: the dtype that layers multiply in.
        int8_threshold: with "int8", multiply as LLM.int8() does (Dettmers et al. 2022): activations
            in 8 bits too, but for columns that hold a magnitude from this on (6.0 there). None:
            only the weight is in 8 bits.
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
    block_size: int | None = None
    double_quant: bool | None = None
    compute_dtype: Any = jnp.bfloat16
    include: str | Iterable[str] | None = None
    exclude: str | Iterable[str] | None = None
    overrides: Mapping[str, Mapping[str, Any]] | Iterable[tuple[str, Mapping[str, Any]]] = ()
    int8_threshold: float | None = None

    def __post_init__(self):
        kind = format_of(self.format)
        self._set("block_size", _block_size(kind, self.block_size))
        self._set("double_quant", _double_quant(kind, self.double_quant))
        self._set("int8_threshold", _threshold(kind, self.int8_threshold))
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

    def with_format(self, format: str) -> "QuantConfig":
        """Return this config in another format, with that format's block size and scales."""
        return self._replace({"format": format})

    def _replace(self, fields) -> "QuantConfig":
        fields = dict(fields)
        if fields.get("format", self.format) != self.format:
            # Another format has defaults of its own.
            fields = {"block_size": None, "double_quant": None, "int8_threshold": None} | fields
        return dataclasses.replace(self, overrides=(), **fields)

    def at(self, path: str) -> "QuantConfig":
        """Return the config for the weight at `path`: the first matching override applied."""
        for pattern, fields in self.overrides:
            if re.search(pattern, path):
                return self._replace(fields)
        return dataclasses.replace(self, overrides=())


def check_config(cfg: Any, kind: type) -> None:
    """Raise TypeError unless `cfg` is of the class `kind`."""
    if not isinstance(cfg, kind):
        raise TypeError(f"cfg must be a {kind.__name__}, got {cfg!r}")


def _block_size(kind: Format, value: int | None) -> int | None:
    if value is None:
        return kind.block_size
    if isinstance(value, bool) or value not in kind.block_sizes:
        allowed = f"one of {kind.block_sizes}" if kind.block_sizes else "None"
        raise ValueError(f"block_size must be {allowed} for {kind.name!r}, got {value!r}")
    return value


def _double_quant(kind: Format, value: bool | None) -> bool:
    if value is None:
        return kind.can_double_quant
    if not isinstance(value, bool):
        raise TypeError(f"double_quant must be True or False, got {value!r}")
    if value and not kind.can_double_quant:
        raise ValueError(
            f"double_quant must be False for {kind.name!r}: its scales are not float32"
        )
    return value


def _threshold(kind: Format, value: float | None) -> float | None:
    if value is None:
        return None
    if kind.name != "int8":
        raise ValueError(f"int8_threshold needs format='int8', got format={kind.name!r}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"int8_threshold must be a positive number, got {value!r}")
    return float(value)


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
