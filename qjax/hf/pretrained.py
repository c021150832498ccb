"""from_pretrained: a language model from a folder, a GGUF file or the hub, layer by layer."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax.hf.extras import require
from qjax.hf.gguf import GGUFFile
from qjax.hf.layout import Stored, arrays, stored
from qjax.hf.safetensors import SafetensorsFolder

Checkpoint = SafetensorsFolder | GGUFFile


def from_pretrained(path_or_id, *, dtype=None, scan_layers: bool = False) -> nnx.Module:
    """Load a language model.

    Args:
        path_or_id: a folder with config.json and safetensors, a .gguf file, or a hub id such as
            "HuggingFaceTB/SmolLM2-135M" (through `huggingface_hub` and its cache).
        dtype: of the weights and of the computation; None takes the checkpoint's (GGUF: float32).
        scan_layers: stack the layers in one and scan over them: compiles much faster.

    Raises:
        ValueError: not a checkpoint, of an unknown family, or with tensors missing, left over or
            of another shape than its config says.
        ModuleNotFoundError: an optional package that this checkpoint needs, with what to install.

    Example:
        >>> model = qjax.from_pretrained("model.gguf")  # doctest: +SKIP
    """
    source = _open(path_or_id)
    config = source.config
    if scan_layers:
        config = dataclasses.replace(config, scan_layers=True)
    dtype = jnp.dtype(source.dtype if dtype is None else dtype)
    model = nnx.eval_shape(lambda: source.family.model(config, dtype=dtype, rngs=nnx.Rngs(0)))
    plan = [
        (layer, leaf, stored(source.family, config, path, layer, leaf))
        for path, layer, leaf in arrays(model)
    ]
    _check_names(source, [where for _, _, where in plan])
    for layer, leaf, where in plan:
        variable = getattr(layer, leaf)
        variable.set_value(jnp.asarray(_read(source, where, variable.shape), dtype))
    return model


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


def _check_names(source: Checkpoint, plan: Iterable[Stored]) -> None:
    needed = {name for where in plan for name in where.names}
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


def _read(source: Checkpoint, where: Stored, shape: tuple[int, ...]) -> np.ndarray:
    """Read an array of a layer; `shape` is what the model expects of it."""
    each = shape[len(where.stack) :]
    expected = each[::-1] if where.transposed else each
    values = []
    for name in where.names:
        value = source.read(name)
        if value.shape != expected:
            raise ValueError(
                f"{source.path}: tensor {name!r} has shape {list(value.shape)}, "
                f"its config says {list(expected)}"
            )
        values.append(value.T if where.transposed else value)
    if not where.stack:
        return values[0]
    return np.stack(values).reshape(shape)
