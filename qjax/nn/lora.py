"""LoraConfig and the initial values of adapters, shared by the Linen and the NNX layers."""

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.config import patterns

INITS = ("kaiming", "gaussian")


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
            zero, so that a new adapter changes nothing.
        rslora: rank-stabilized scaling (Kalajdzievski 2023).

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> LoraConfig(rank=8, alpha=16).scaling
        2.0
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    include: str | Iterable[str] | None = None
    exclude: str | Iterable[str] | None = None
    init: str = "kaiming"
    rslora: bool = False

    def __post_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be a positive integer, got {self.rank!r}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.init not in INITS:
            raise ValueError(f"init must be one of {INITS}, got {self.init!r}")
        object.__setattr__(self, "include", patterns("include", self.include))
        object.__setattr__(self, "exclude", patterns("exclude", self.exclude))

    @property
    def scaling(self) -> float:
        """Factor of the adapter's output."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


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
    """
    shape = (*batch_shape, *contract_shape, cfg.rank)
    if cfg.init == "kaiming":
        bound = 1 / math.sqrt(math.prod(contract_shape))
        a = jax.random.uniform(key, shape, dtype, -bound, bound)
    else:
        a = jax.random.normal(key, shape, dtype) * np.array(1 / cfg.rank, dtype)
    return a, jnp.zeros((*batch_shape, cfg.rank, *out_shape), dtype)
