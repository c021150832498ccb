"""from_pretrained: a language model from a folder, a GGUF file or the hub, layer by layer."""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.progress import track

from qjax.core.config import QuantConfig
from qjax.hf.bnb_config import BnbConfig, is_skipped, read_bnb_config
from qjax.hf.extras import require
from qjax.hf.gguf import GGUFFile
from qjax.hf.layout import Stored, arrays, stored
from qjax.hf.safetensors import SafetensorsFolder
from qjax.hf.streaming import Checkpoint, read_float, read_packed, read_quantized
from qjax.nn.nnx_param import QuantParam
from qjax.swap.nnx import quantize_model
from qjax.swap.nnx_find import find_layers


def from_pretrained(
    path_or_id,
    *,
    config: QuantConfig | Mapping[str, Any] | None = None,
    dtype=None,
    scan_layers: bool = False,
    progress: bool = True,
) -> nnx.Module:
    """Load a language model, in floating point or in 4 bits.

    Each tensor is read, and quantized on the device, before the next: what is held is the model as
    it will be and one tensor. Weights that the checkpoint holds in bitsandbytes' 4 bits are taken
    as they are.

    Args:
        path_or_id: a folder with config.json and safetensors, a .gguf file, or a hub id such as
            "HuggingFaceTB/SmolLM2-135M" (through `huggingface_hub` and its cache).
        config: quantizes the dense layers, and experts, that the checkpoint holds in floating
            point; a BitsAndBytesConfig as a dict may stand for it. None leaves them so.
        dtype: of the float weights and of the computation; None takes the checkpoint's (GGUF:
            float32).
        scan_layers: stack the layers in one and scan over them: compiles much faster.
        progress: show a bar on a terminal.

    Raises:
        ValueError: not a checkpoint, of an unknown family, or with tensors missing, left over or
            of another shape than its config says; a config that matches nothing.
        ModuleNotFoundError: an optional package that this checkpoint needs, with what to install.

    Example:
        >>> model = qjax.from_pretrained("model.gguf", config=qjax.QuantConfig())  # doctest: +SKIP
    """
    source = _open(path_or_id)
    quant, skip = _quantization(source, config)
    shape = source.config
    if scan_layers:
        shape = dataclasses.replace(shape, scan_layers=True)
    dtype = jnp.dtype(source.dtype if dtype is None else dtype)
    model = nnx.eval_shape(lambda: source.family.model(shape, dtype=dtype, rngs=nnx.Rngs(0)))
    plan = list(_plan(source, shape, model))
    _check_names(source, plan)
    _take_packed(source, model, plan, quant)
    if quant is not None:
        kept = [] if quant.include else list(source.family.float_layers)
        kept += [
            f"^{re.escape(item.path)}$"
            for item in plan
            if any(is_skipped(name.rpartition(".")[0], skip) for name in item.where.names)
        ]
        quant = dataclasses.replace(quant, exclude=(*(quant.exclude or ()), *kept))
        quantize_model(model, quant)
    show = progress and Console(stderr=True).is_terminal
    for item in track(plan, "Loading", transient=True, disable=not show):
        _fill(source, item, dtype)
    if source.data is not None:
        model.config_json = json.dumps(source.data)
    return model


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


def _plan(source: Checkpoint, shape, model: nnx.Module) -> Iterator[Item]:
    for path, layer, leaf in arrays(model):
        where = stored(source.family, shape, path, layer, leaf)
        yield Item("/".join(map(str, (*path, leaf))), layer, leaf, where)


def _quantization(source: Checkpoint, config) -> tuple[QuantConfig | None, tuple[str, ...] | None]:
    """Return the config for float weights, and the modules that a BitsAndBytesConfig skips."""
    asked: BnbConfig | None = None
    if isinstance(config, QuantConfig):
        return config, None
    if isinstance(config, Mapping):
        asked = read_bnb_config(config, "config")
        if asked.quant is None:
            raise NotImplementedError("config: load_in_8bit; only 4-bit formats can be made")
    elif config is not None:
        raise TypeError(f"config must be a QuantConfig or a dict, got {type(config).__name__}")
    elif not source.packed:
        asked = source.bnb  # a float checkpoint whose config.json asks for 4 bits
    return (None, None) if asked is None else (asked.quant, asked.skip)


def _take_packed(source, model: nnx.Module, plan: list[Item], quant: QuantConfig | None) -> None:
    """Give the layers of which the checkpoint holds 4-bit weights those weights."""
    classes = {id(found.layer): found.cls for found in find_layers(model)}
    made = source.bnb.quant if source.bnb else None
    for item in plan:
        packed = [name in source.packed for name in item.where.names]
        if not any(packed):
            continue
        if not all(packed) or item.leaf != "kernel":
            name = item.where.names[packed.index(True)]
            raise ValueError(f"{source.path}: tensor {name!r} cannot be in 4 bits")
        q = read_packed(source, item.where, item.variable.shape)
        config = quant or made or QuantConfig(compute_dtype=q.dtype)
        classes[id(item.layer)].convert(item.layer, config, weight=QuantParam(q))


def _fill(source: Checkpoint, item: Item, dtype) -> None:
    variable = item.variable
    if not isinstance(variable, QuantParam):
        variable.set_value(read_float(source, item.where, variable.shape, dtype))
    elif isinstance(variable.q.packed, jax.ShapeDtypeStruct):
        variable.set_value(read_quantized(source, item.where, variable.q))


def _open(path_or_id) -> Checkpoint:
    path = Path(path_or_id).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return GGUFFile(path)
    if path.is_dir():
        return SafetensorsFolder(path)
    name = str(path_or_id)
    if path.exists() or path.is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise ValueError(f"path_or_id={name!r} is no model folder, .gguf file or hub id")
    hub = require("huggingface_hub", "hf")
    files = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    return SafetensorsFolder(Path(hub.snapshot_download(name, allow_patterns=files)))


def _check_names(source: Checkpoint, plan: Iterable[Item]) -> None:
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
