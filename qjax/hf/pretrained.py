"""from_pretrained: a language model from a folder, a GGUF file or the hub, layer by layer."""

import json
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh
from rich.console import Console
from rich.progress import track

from qjax.core.config import QuantConfig
from qjax.core.qtensor import QTensor
from qjax.hf.gguf import GGUFFile
from qjax.hf.hub import locate
from qjax.hf.safetensors import SafetensorsFolder
from qjax.hf.sharding import Placement
from qjax.hf.skeleton import Item, skeleton
from qjax.hf.streaming import Checkpoint, read_float, read_packed, read_quantized
from qjax.models.base import Pretrained


def from_pretrained(
    path_or_id,
    *,
    config: QuantConfig | Mapping[str, Any] | None = None,
    dtype=None,
    mesh: Mesh | None = None,
    scan_layers: bool = False,
    progress: bool = True,
) -> Pretrained:
    """Load a language model, in floating point or in 4 bits.

    Each tensor is read, and quantized on the device, before the next: what is held is the model as
    it will be and one tensor. Weights that the checkpoint holds in 4 or 8 bits, by bitsandbytes,
    GPTQ or AWQ, are taken as they are.

    Args:
        path_or_id: a folder with config.json and safetensors, a .gguf file, or a hub id such as
            "HuggingFaceTB/SmolLM2-135M" (through `huggingface_hub` and its cache).
        config: quantizes the dense layers, and experts, that the checkpoint holds in floating
            point; a BitsAndBytesConfig as a dict may stand for it. None leaves them so.
        dtype: of the float weights and of the computation; None takes the checkpoint's (GGUF:
            float32).
        mesh: place the arrays on it: over an axis "tensor" the layers are split as in Megatron-LM,
            over "fsdp" each along its other axis, over "expert" experts; over "data" nothing. What
            an axis does not divide, or would split a block, stays whole.
        scan_layers: stack the layers in one and scan over them: compiles much faster.
        progress: show a bar on a terminal.

    Raises:
        ValueError: not a checkpoint, of an unknown family, or with tensors missing, left over or
            of another shape than its config says; a config that matches nothing.
        NotImplementedError: a quantization that is not read, such as GPTQ with act-order.
        ModuleNotFoundError: an optional package that this checkpoint needs, with what to install.

    Example:
        >>> model = qjax.from_pretrained("model.gguf", config=qjax.QuantConfig())  # doctest: +SKIP
    """
    source = open_checkpoint(path_or_id)
    heads = source.config.num_key_value_heads
    placement = None if mesh is None else Placement(mesh, heads)
    model, plan = skeleton(source, config, dtype, scan_layers)
    console = Console(stderr=True)
    if progress and console.is_terminal:
        plan = track(plan, "Loading", console=console, transient=True)
    for item in plan:
        item.variable.set_value(_read(source, item, placement))
    if source.data is not None:
        model.config_json = json.dumps(source.data)
    return model


def _read(source: Checkpoint, item: Item, placement: Placement | None):
    """Return an array of the model: floating point, 4 bits as stored, or quantized now."""
    like = item.variable.get_raw_value()
    sharding = None if placement is None else placement(item.path, like)
    if not isinstance(like, QTensor):
        return read_float(source, item.where, like, sharding)
    if item.where.names[0] in source.packed:
        return read_packed(source, item.where, sharding)
    return read_quantized(source, item.where, like, sharding)


def open_checkpoint(path_or_id) -> Checkpoint:
    """Open a folder, a .gguf file or a model of the hub; nothing but its head is read."""
    path = locate(path_or_id)
    return SafetensorsFolder(path) if path.is_dir() else GGUFFile(path)
