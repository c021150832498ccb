"""The model that a checkpoint holds, without its arrays: which are in 4 bits, and where each is."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from qjax.core.config import QuantConfig
from qjax.hf.bnb_config import BnbConfig, is_skipped, read_bnb_config
from qjax.hf.layout import Stored, arrays, stored
from qjax.hf.streaming import Checkpoint, packed_like
from qjax.nn.nnx_param import QuantParam
from qjax.swap.nnx import quantize_model
from qjax.swap.nnx_find import find_layers
from qjax.swap.nnx_raw import find_weights
from qjax.swap.policy import matches


class Item(NamedTuple):
    """An array of the model, and where it is."""

    path: str  # "/"-joined
    layer: nnx.Module
    leaf: str
    where: Stored

    @property
    def variable(self) -> nnx.Variable:
        """What holds the array."""
        return getattr(self.layer, self.leaf)


def skeleton(
    source: Checkpoint,
    config: QuantConfig | Mapping[str, Any] | None = None,
    dtype: Any = None,
    scan_layers: bool = False,
) -> tuple[Any, list[Item]]:
    """Return the model with abstract arrays, its layers in 4 bits where they will be, and a plan.

    The arguments are those of `from_pretrained`. Of the tensors only the quant_states are read.
    """
    quant, skip = _quantization(source, config)
    shape = source.config
    if scan_layers:
        shape = dataclasses.replace(shape, scan_layers=True)
    dtype = jnp.dtype(source.dtype if dtype is None else dtype)
    model = nnx.eval_shape(lambda: source.family.model(shape, dtype=dtype, rngs=nnx.Rngs(0)))
    plan = [
        Item(
            path="/".join(map(str, (*path, leaf))),
            layer=layer,
            leaf=leaf,
            where=stored(source.family, shape, path, layer, leaf),
        )
        for path, layer, leaf in arrays(model)
    ]
    _check_names(source, plan)
    _take_packed(source, model, plan, quant)
    if quant is not None:
        kept = [] if quant.include else list(source.family.float_layers)
        kept += [f"^{re.escape(item.path)}$" for item in plan if _is_skipped(item, skip)]
        # Those that match nothing here are no mistake of the user's.
        paths = [found.weight_path for found in find_weights(model)]
        kept = [pattern for pattern in kept if any(matches(path, [pattern]) for path in paths)]
        quantize_model(model, dataclasses.replace(quant, exclude=(*(quant.exclude or ()), *kept)))
    return model, plan


def _quantization(source: Checkpoint, config) -> tuple[QuantConfig | None, tuple[str, ...] | None]:
    """Return the config for float weights, and the modules that a BitsAndBytesConfig skips."""
    asked: BnbConfig | None = None
    if isinstance(config, QuantConfig):
        return config, None
    if isinstance(config, Mapping):
        asked = read_bnb_config(config, "config")
    elif config is not None:
        raise TypeError(f"config must be a QuantConfig or a dict, got {type(config).__name__}")
    elif not source.packed:
        asked = source.bnb  # a float checkpoint whose config.json asks for 4 or 8 bits
    return (None, None) if asked is None else (asked.quant, asked.skip)


def _is_skipped(item: Item, skip: tuple[str, ...] | None) -> bool:
    return any(is_skipped(name.rpartition(".")[0], skip) for name in item.where.names)


def _take_packed(source, model: nnx.Module, plan: list[Item], quant: QuantConfig | None) -> None:
    """Turn the layers of which the checkpoint holds 4-bit weights into layers of such weights."""
    classes = {id(found.layer): found.cls for found in find_layers(model)}
    made = source.bnb.quant if source.bnb else None
    for item in plan:
        packed = [name in source.packed for name in item.where.names]
        if not any(packed):
            continue
        if not all(packed) or item.leaf != "kernel":
            name = item.where.names[packed.index(True)]
            raise ValueError(f"{source.path}: tensor {name!r} cannot be in 4 bits")
        q = packed_like(source, item.where, item.variable.shape)
        config = quant or made or QuantConfig(compute_dtype=q.dtype)
        classes[id(item.layer)].convert(item.layer, config, weight=QuantParam(q))


def _check_names(source: Checkpoint, plan: list[Item]) -> None:
    needed = {name for item in plan for name in item.where.names}
    held = set(source.tensors)
    if missing := sorted(needed - held):
        raise ValueError(f"{source.path} lacks {len(missing)} tensors, first {missing[0]!r}")
    ignored = list(source.family.ignored)
    if source.config.tie_word_embeddings and "lm_head" in source.family.names:
        ignored.append(f"^{re.escape(source.family.names['lm_head'])}\\.weight$")
    left = sorted(n for n in held - needed if not any(re.search(p, n) for p in ignored))
    if left:
        raise ValueError(
            f"{source.path} holds {len(left)} tensors that the model has no place for, "
            f"first {left[0]!r}"
        )
