"""LoraConfig and the initial values of adapters, shared by the Linen and the NNX layers."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.config import overrides, patterns

# What the arrays of an adapter are called, in every layer, tree and checkpoint.
ADAPTER_LEAVES = ("lora_a", "lora_b", "lora_magnitude")
INITS = ("kaiming", "gaussian", "pissa", "loftq")
_OVERRIDABLE = ("rank", "alpha", "dropout")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: their size, and the layers that get one.

    Attributes:
        rank: inner size of the adapter.
        alpha: the adapter's output is scaled by alpha / rank, or alpha / sqrt(rank) with rslora.
        dropout: probability of dropping an element of the adapter's input while training.
        include: pattern or patterns (`re.search` on "/"-joined paths); only layers that match get
            adapters. None: every quantized layer.
        exclude: pattern or patterns of layers that get none.
        init: "kaiming" (uniform, as PEFT) or "gaussian" (standard deviation 1 / rank) for A; B is
            zero, so that a new adapter changes nothing. "pissa" and "loftq" compute both from the
            float weight, and change the base: see `qjax.add_lora`.
        rslora: rank-stabilized scaling (Kalajdzievski 2023).
        dora: also learn the length of each column of the weight (Liu et al. 2024); not of
            embeddings.
        modules_to_save: pattern or patterns of modules, such as "lm_head", whose float arrays the
            adapter replaces: trained whole, and saved with it. NNX alone.
        overrides: pattern -> dict of rank, alpha and dropout, as a mapping or pairs; the first
            match wins.
        loftq_iterations: of "loftq". One leaves the base as it is; more fit it better and change
            it.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> LoraConfig(rank=8, alpha=16).scaling
        2.0
        >>> LoraConfig(rank=8, overrides={"down_proj": {"rank": 16}}).at("0/mlp/down_proj").rank
        16
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    include: str | Iterable[str] | None = None
    exclude: str | Iterable[str] | None = None
    init: str = "kaiming"
    rslora: bool = False
    dora: bool = False
    modules_to_save: str | Iterable[str] | None = None
    overrides: Mapping[str, Mapping[str, Any]] | Iterable[tuple[str, Mapping[str, Any]]] = ()
    loftq_iterations: int = 5

    def __post_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be a positive integer, got {self.rank!r}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.init not in INITS:
            raise ValueError(f"init must be one of {INITS}, got {self.init!r}")
        if isinstance(self.loftq_iterations, bool) or self.loftq_iterations < 1:
            raise ValueError(f"loftq_iterations must be positive, got {self.loftq_iterations!r}")
        for name in ("include", "exclude", "modules_to_save"):
            object.__setattr__(self, name, patterns(name, getattr(self, name)))
        object.__setattr__(self, "overrides", overrides(self.overrides, _OVERRIDABLE))
        for pattern, fields in self.overrides:
            try:
                self._replace(fields)
            except (ValueError, TypeError) as error:
                raise ValueError(f"overrides[{pattern!r}]: {error}") from None

    @property
    def scaling(self) -> float:
        """Factor of the adapter's output."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def reads_weights(self) -> bool:
        """Whether `init` needs the float weights."""
        return self.init in ("pissa", "loftq")

    @property
    def changes_base(self) -> bool:
        """Whether `init` puts other base weights in the place of the quantized ones."""
        return self.init == "pissa" or (self.init == "loftq" and self.loftq_iterations > 1)

    def check_source(self, source: Any) -> None:
        """Raise ValueError unless `source`, where float weights come from, is there if needed."""
        if self.reads_weights and source is None:
            raise ValueError(
                f"init={self.init!r} needs the float weights: source= takes a float model or its "
                "parameters, or a function such as qjax.float_weights(path, model)"
            )
        if source is not None and not self.reads_weights:
            raise ValueError(f"init={self.init!r} reads no weights: leave source= out")

    def at(self, path: str) -> "LoraConfig":
        """Return the config for the layer at `path`: the first matching override applied."""
        for pattern, fields in self.overrides:
            if re.search(pattern, path):
                return self._replace(fields)
        return dataclasses.replace(self, overrides=())

    def _replace(self, fields) -> "LoraConfig":
        return dataclasses.replace(self, overrides=(), **dict(fields))


def init_adapter(
    key: jax.Array,
    contract_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    cfg: LoraConfig,
    batch_shape: tuple[int, ...] = (),
    dtype=jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """Return new A [*batch, *contract, rank] and zero B [*batch, rank, *out].

    "kaiming" is torch's kaiming_uniform with a = sqrt(5), PEFT's default: uniform within
    1 / sqrt(fan_in).

    Raises:
        ValueError: an init that reads the weights.
    """
    if cfg.reads_weights:
        raise ValueError(f"init={cfg.init!r} needs the float weights: use add_lora with source=")
    shape = (*batch_shape, *contract_shape, cfg.rank)
    if cfg.init == "kaiming":
        bound = 1 / math.sqrt(math.prod(contract_shape))
        a = jax.random.uniform(key, shape, dtype, -bound, bound)
    else:
        a = jax.random.normal(key, shape, dtype) * np.array(1 / cfg.rank, dtype)
    return a, jnp.zeros((*batch_shape, cfg.rank, *out_shape), dtype)
