"""from_pretrained: a language model from a folder, a GGUF file or the hub, layer by layer."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax.hf.extras import require
from qjax.hf.gguf import GGUFFile
from qjax.hf.safetensors import SafetensorsFolder
from qjax.models import CausalLM

Checkpoint = SafetensorsFolder | GGUFFile
Names = str | tuple[str, ...]  # of one tensor, or of one for each of the stacked layers

# What a layer calls its arrays -> what files call them. Kernels are [in, out], in files [out, in].
_SUFFIX = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


def from_pretrained(path_or_id, *, dtype=None, scan_layers: bool = False) -> CausalLM:
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
    config = dataclasses.replace(source.config, scan_layers=scan_layers)
    dtype = jnp.dtype(source.dtype if dtype is None else dtype)
    model = nnx.eval_shape(lambda: CausalLM(config, dtype=dtype, rngs=nnx.Rngs(0)))
    layers = {path: layer for path, layer in nnx.iter_modules(model) if _arrays(layer)}
    names = {path: _tensor_names(source, path, layer) for path, layer in layers.items()}
    _check_names(source, names.values())
    for path, layer in layers.items():
        for leaf, variable in _arrays(layer).items():
            value = _read(source, names[path][leaf], leaf, variable.shape)
            variable.set_value(jnp.asarray(value, dtype))
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


def _arrays(layer: nnx.Module) -> dict[str, nnx.Variable]:
    """Return the arrays that a layer itself holds, by name."""
    return {name: value for name, value in vars(layer).items() if isinstance(value, nnx.Param)}


def _tensor_names(source: Checkpoint, path: tuple, layer: nnx.Module) -> dict[str, Names]:
    """Return, for each array of the layer at `path`, the tensor it is; of a stacked layer, all."""
    stacked = path[0] == "layers" and not isinstance(path[1], int)
    if stacked:
        template, indices = ("layers", "{}", *path[1:]), range(source.config.num_hidden_layers)
    elif path[0] == "layers":
        template, indices = ("layers", "{}", *path[2:]), [path[1]]
    else:
        template, indices = path, [None]
    prefix = source.modules["/".join(template)]

    def names(leaf):
        each = tuple(f"{prefix.format(i)}.{_SUFFIX[leaf]}" for i in indices)
        return each if stacked else each[0]

    return {leaf: names(leaf) for leaf in _arrays(layer)}


def _check_names(source: Checkpoint, layers: Iterable[dict[str, Names]]) -> None:
    needed = set()
    for layer in layers:
        for names in layer.values():
            needed.update([names] if isinstance(names, str) else names)
    held = set(source.tensors)
    if missing := sorted(needed - held):
        raise ValueError(f"{source.path} lacks {len(missing)} tensors, first {missing[0]!r}")
    tied = source.config.tie_word_embeddings
    left = sorted(
        name
        for name in held - needed
        if not name.endswith("rotary_emb.inv_freq") and not (tied and name == "lm_head.weight")
    )
    if left:
        raise ValueError(
            f"{source.path} holds {len(left)} tensors that the model has no place for, "
            f"first {left[0]!r}"
        )


def _read(source: Checkpoint, names: Names, leaf: str, shape: tuple[int, ...]) -> np.ndarray:
    """Read an array of a layer; `shape` is what the model expects of it."""
    if not isinstance(names, str):
        return np.stack([_read(source, name, leaf, shape[1:]) for name in names])
    value = source.read(names)
    expected = shape[::-1] if leaf == "kernel" else shape
    if value.shape != expected:
        raise ValueError(
            f"{source.path}: tensor {names!r} has shape {list(value.shape)}, "
            f"its config says {list(expected)}"
        )
    return value.T if leaf == "kernel" else value
