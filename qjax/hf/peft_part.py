"""The arrays of one adapter in our order of axes, as read from a file and as a layer holds them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qjax.nn.lora import LoraConfig
from qjax.swap.nnx_find import Found


class Part(NamedTuple):
    """An adapter of one weight, or of a stack of them.

    Attributes:
        a: [*stack, in, rank].
        b: [*stack, rank, out].
        magnitude: [*stack, out] of DoRA, or None.
    """

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None = None

    @classmethod
    def of(cls, layer: Any, index: tuple[int, ...]) -> "Part":
        """Take the adapter of a layer, at an index of its stacked axes."""
        magnitude = layer.lora_magnitude
        return cls(
            np.asarray(layer.lora_a[...])[index],
            np.asarray(layer.lora_b[...])[index],
            None if magnitude is None else np.asarray(magnitude[...])[index],
        )

    @classmethod
    def read(
        cls, name: str, config: LoraConfig, half: Mapping[str, np.ndarray], folder: Path
    ) -> "Part":
        """Take the tensors of a module: "A" [rank, in], "B" [out, rank], "magnitude_vector" [out].

        Raises:
            ValueError: others, or of shapes that do not fit.
        """
        rank = config.rank
        a, b, magnitude = (half.get(part) for part in ("A", "B", "magnitude_vector"))
        shapes = {part: list(value.shape) for part, value in sorted(half.items())}
        sizes = [len(shapes.get(part, ())) == 2 for part in "AB"]
        if a is None or b is None or not all(sizes) or (a.shape[0], b.shape[1]) != (rank, rank):
            raise ValueError(
                f"{folder}: {name!r} has {shapes}, must be A [{rank}, in] and B [out, {rank}]"
            )
        if config.dora != (magnitude is not None):
            has = "no" if config.dora else "a"
            raise ValueError(
                f"{folder}: {name!r} has {has} lora_magnitude_vector, and use_dora={config.dora}"
            )
        if magnitude is not None and magnitude.shape != b.shape[:1]:
            raise ValueError(
                f"{folder}: {name!r} has magnitudes {list(magnitude.shape)}, must be "
                f"{list(b.shape[:1])}"
            )
        return cls(a.T, b.T, magnitude)


def stacked(
    found: Found, parts: Mapping[tuple[int, ...], tuple[LoraConfig, Part]], folder: Path
) -> tuple[LoraConfig, Part]:
    """Return one config and one adapter for a layer; layers of a stack without one get zeros.

    Raises:
        ValueError: an adapter of other sizes, or adapters that cannot be stacked.
    """
    configs = {config for config, _ in parts.values()}
    if len(configs) > 1:
        raise ValueError(
            f"{folder}: the stacked layers {found.path!r} have adapters of different rank or "
            "alpha; load the model with scan_layers=False"
        )
    config = configs.pop()
    weight = tuple(found.weight.shape)
    stack, (fan_in, out) = weight[:-2], weight[-2:]
    if config.dora and len(parts) < np.prod(stack):
        raise ValueError(
            f"{folder}: of the stacked layers {found.path!r} some have no DoRA adapter; load the "
            "model with scan_layers=False"
        )
    for _, part in parts.values():
        given = (part.a.shape[-2], part.b.shape[-1])
        if given != (fan_in, out):
            raise ValueError(
                f"{folder}: the adapter of {found.path!r} is for a layer of {list(given)}, this "
                f"model's is [{fan_in}, {out}]"
            )
    if list(parts) == [()]:
        ((_, part),) = parts.values()
        return config, part._replace(
            **{name: a.astype(np.float32) for name, a in part._asdict().items() if a is not None}
        )
    a = np.zeros((*stack, fan_in, config.rank), np.float32)
    b = np.zeros((*stack, config.rank, out), np.float32)
    magnitude = np.zeros((*stack, out), np.float32) if config.dora else None
    for index, (_, part) in parts.items():
        a[index], b[index] = part.a, part.b
        if magnitude is not None:
            magnitude[index] = part.magnitude
    return config, Part(a, b, magnitude)
