"""Adapters of fused experts, PEFT's `target_parameters`: one A and one B for all experts.

A is stored [experts * rank, in], experts first, and B [out, rank * experts], experts last. Where
gate and up projection are one parameter there and two layers here, both have its A.
Source: peft 0.21, tuners/lora/layer.py (ParamWrapper).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qjax.hf.peft_names import Fused, Index
from qjax.hf.peft_part import Part
from qjax.nn.lora import LoraConfig
from qjax.swap.nnx_find import Found


def unfuse(
    parameter: Fused, config: LoraConfig, half: Mapping[str, np.ndarray], folder: Path
) -> Iterator[tuple[Found, Index, Part]]:
    """Yield the adapter of each of our layers; those of one parameter have the same A.

    Raises:
        ValueError: tensors of other shapes.
        NotImplementedError: dropout or DoRA, which PEFT has not for experts.
    """
    if config.dropout or config.dora:
        raise NotImplementedError(f"{folder}: {parameter.name!r} with dropout or DoRA")
    shapes = [f.weight.shape[-3:] for f in parameter.parts]
    count, fan_in = shapes[0][:2]
    outs = [shape[-1] for shape in shapes]
    expected = {"A": (count * config.rank, fan_in), "B": (sum(outs), config.rank * count)}
    given = {part: value.shape for part, value in half.items()}
    if given != expected:
        raise ValueError(
            f"{folder}: {parameter.name!r} has { {k: list(v) for k, v in sorted(given.items())} }, "
            f"must be { {k: list(v) for k, v in expected.items()} }"
        )
    a = half["A"].reshape(count, config.rank, fan_in).swapaxes(1, 2).astype(np.float32)
    b = half["B"].reshape(sum(outs), config.rank, count).transpose(2, 1, 0).astype(np.float32)
    for found, part in zip(parameter.parts, np.split(b, np.cumsum(outs)[:-1], axis=-1)):
        yield found, parameter.index, Part(a, part)


def fuse(parameter: Fused) -> tuple[LoraConfig, Part]:
    """Return the config and the adapter [in, experts * rank], [rank * experts, out] of a parameter.

    Two layers whose A differ have one adapter of twice the rank, with the same scaling.

    Raises:
        ValueError: adapters that PEFT has no place for.
    """
    layers: list[Any] = [f.layer for f in parameter.parts]
    has = [getattr(layer, "lora_a", None) is not None for layer in layers]
    held = [layer for layer, adapted in zip(layers, has) if adapted]
    config = held[0].lora_config
    alike = {(c.scaling, c.rank, c.rslora) for c in (layer.lora_config for layer in held)}
    if config.dropout or config.dora or len(alike) > 1:
        raise ValueError(
            f"PEFT has no dropout, DoRA, or different ranks or alphas for {parameter.name!r}"
        )
    parts = [Part.of(x, parameter.index) if adapted else None for x, adapted in zip(layers, has)]
    widths = [f.weight.shape[-1] for f in parameter.parts]
    firsts = [part.a for part in parts if part is not None]
    count, _, rank = firsts[0].shape
    if all(np.array_equal(a, firsts[0]) for a in firsts):
        a = firsts[0]
        blocks = [
            np.zeros((count, rank, n), a.dtype) if p is None else p.b for p, n in zip(parts, widths)
        ]
        b = np.concatenate(blocks, axis=-1)
    else:
        a = np.concatenate(firsts, axis=-1)
        b = np.zeros((count, a.shape[-1], sum(widths)), a.dtype)
        columns = np.cumsum([0, *widths])
        for i, part in enumerate(filter(None, parts)):
            b[:, i * rank : (i + 1) * rank, columns[i] : columns[i + 1]] = part.b
        grown = a.shape[-1] / rank
        alpha = config.alpha * (grown**0.5 if config.rslora else grown)
        config = dataclasses.replace(config, rank=a.shape[-1], alpha=alpha)
    a = a.transpose(1, 0, 2).reshape(a.shape[1], -1)
    return config, Part(a, b.transpose(1, 0, 2).reshape(-1, b.shape[-1]))
