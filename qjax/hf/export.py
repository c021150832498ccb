"""save_pretrained: a model as a folder of config.json and safetensors, in 4 bits or in float."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from qjax.core.qtensor import QTensor
from qjax.hf.bitsandbytes import write_qtensor
from qjax.hf.bnb_config import FORMATS_4BIT, write_bnb_config
from qjax.hf.bnb_int8 import write_int8
from qjax.hf.extras import write_whole
from qjax.hf.families import Family, family
from qjax.hf.layout import Stored, arrays, stored
from qjax.models.base import Pretrained
from qjax.nn.nnx_adapter import base_param, saved_params
from qjax.nn.nnx_layer import LoraLayer, QuantLayer

LAYOUTS = ("bitsandbytes", "float")
_INDEX = "model.safetensors.index.json"


def save_pretrained(
    model: Pretrained,
    path,
    layout: str = "bitsandbytes",
    *,
    dtype=None,
    config: Mapping[str, Any] | None = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write a folder that Hugging Face's transformers loads.

    Args:
        model: a language model of this library.
        path: the folder, made if it is missing; files of the same names are replaced.
        layout: "bitsandbytes" writes NF4, FP4 and int8 weights as they are, byte for byte what
            transformers with bitsandbytes writes; experts, for which it has no layout, are decoded.
            Adapters are left out. "float" decodes all weights, and merges adapters into theirs.
        dtype: of float weights; None keeps the model's.
        config: the config.json to write, for a model that was not loaded from a folder.
        max_shard_size: bytes in a file before another is begun.

    Raises:
        ValueError: an unknown layout; no config.json; a weight that the layout cannot hold.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be one of {LAYOUTS}")
    data = _config_json(model, config)
    known = family(data)
    if layout == "bitsandbytes":
        data["quantization_config"] = _bnb_config(model, known)
    _name_dtype(data, model.dtype if dtype is None else jnp.dtype(dtype))
    folder = Path(path).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    _write_shards(folder, _tensors(model, known, layout, dtype), max_shard_size)
    _write_json(folder / "config.json", data)


def _config_json(model: Pretrained, config: Mapping[str, Any] | None) -> dict[str, Any]:
    text = model.config_json
    if config is None and text is None:
        raise ValueError(
            "the model was not loaded from a folder with a config.json: pass config=, its contents"
        )
    data = dict(json.loads(text or "{}") if config is None else config)
    data.pop("quantization_config", None)
    return data


def _name_dtype(data: dict[str, Any], dtype) -> None:
    """Have config.json say the dtype, under the key it has; float32 need not be said."""
    key = "torch_dtype" if "torch_dtype" in data else "dtype"
    if data.get(key, "float32") != dtype.name:
        data[key] = dtype.name


def _bnb_config(model: Pretrained, known: Family) -> dict[str, Any]:
    """Return the quantization_config; it lists the layers that transformers must leave alone."""
    layers = [layer for _, layer in nnx.iter_modules(model) if isinstance(layer, QuantLayer)]
    if not layers:
        raise ValueError('layout="bitsandbytes": the model has no 4-bit weight; use layout="float"')
    plain: list[str] = []  # dense layers in float
    odd = False  # whether they are others than transformers' own choice
    for path, layer, leaf in arrays(model):
        if leaf != "kernel" or not isinstance(layer, nnx.Linear):
            continue
        where = stored(known, model.config, path, layer, leaf)
        head, name = path == ("lm_head",), "/".join(map(str, path))
        by_default = head or any(re.search(p, name) for p in (*known.float_layers, "router$"))
        if isinstance(layer, QuantLayer):
            odd |= by_default
        else:
            plain += [tensor.removesuffix(".weight") for tensor in where.names]
            odd |= not by_default
    held = [getattr(layer, layer.weight_name).q for layer in layers]
    formats = {q.format for q in held}
    if not (formats == {"int8"} or formats <= set(FORMATS_4BIT)):
        raise ValueError(
            f"layout='bitsandbytes' holds {FORMATS_4BIT} or 'int8', the model has weights in "
            f"{sorted(formats)}; use layout='float'"
        )
    return write_bnb_config(held[0], layers[0].compute_dtype, sorted(plain) if odd else None)


def _tensors(
    model: Pretrained, known: Family, layout: str, dtype
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the tensors of one array of a file at a time."""
    for path, layer, leaf in arrays(model):
        where = stored(known, model.config, path, layer, leaf)
        value = getattr(layer, leaf).get_raw_value()
        if layout == "bitsandbytes" and leaf in saved_params(layer):
            value = base_param(layer, leaf).get_raw_value()
        if isinstance(layer, LoraLayer) and layer.lora_a is not None and layout == "float":
            value = layer.float_weight(dtype) if leaf == layer.weight_name else value
        for i, name in enumerate(where.names):
            yield _tensor(name, _one(value, where, i), where, layout, dtype)


def _one(value, where: Stored, index: int):
    """Return the part of a stacked array that is one tensor of the file."""
    at = np.unravel_index(index, where.stack) if where.stack else ()
    return jax.tree.map(lambda leaf: leaf[at], value)


def _tensor(name: str, value, where: Stored, layout: str, dtype) -> dict[str, np.ndarray]:
    dense = isinstance(value, QTensor) and value.contract_axes == (0,) and not value.batch_shape
    if layout == "bitsandbytes" and dense and not where.stacks_experts:
        return (write_int8 if value.format == "int8" else write_qtensor)(name, value)
    if isinstance(value, QTensor):
        value = value.dequantize(dtype)
    array = np.asarray(value if dtype is None else value.astype(dtype))
    return {name: np.ascontiguousarray(array.T if where.transposed else array)}


def _write_shards(folder: Path, tensors: Iterator[dict[str, np.ndarray]], limit: int) -> None:
    """Write the tensors to one file, or to numbered files and an index."""
    temporary: list[Path] = []
    held_by: list[list[str]] = []  # names of tensors in each file
    total = 0
    try:
        for shard in _shards(tensors, limit):
            temporary.append(folder / f".shard-{len(temporary)}-{os.getpid()}.tmp")
            save_file(shard, temporary[-1], metadata={"format": "pt"})
            held_by.append(list(shard))
            total += sum(array.nbytes for array in shard.values())
        names = _shard_names(len(temporary))
        for file, name in zip(temporary, names, strict=True):
            file.replace(folder / name)
    finally:
        for file in temporary:
            file.unlink(missing_ok=True)
    if len(names) == 1:
        (folder / _INDEX).unlink(missing_ok=True)
        return
    weight_map = {t: name for held, name in zip(held_by, names, strict=True) for t in held}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / _INDEX, index)
    (folder / "model.safetensors").unlink(missing_ok=True)


def _shards(
    tensors: Iterator[dict[str, np.ndarray]], limit: int
) -> Iterator[dict[str, np.ndarray]]:
    """Gather groups of tensors that stay together into shards of at most `limit` bytes."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for group in tensors:
        new = sum(array.nbytes for array in group.values())
        if shard and size + new > limit:
            yield shard
            shard, size = {}, 0
        shard.update(group)
        size += new
    yield shard


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Write JSON as transformers spells it."""
    text = json.dumps(data, indent=2, sort_keys=True) + "\n"
    write_whole(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
