"""from_pretrained: a model from a folder or file, tensor by tensor."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax.hf.extras import require
from qjax.hf.gguf import GGUFFile
from qjax.hf.safetensors import SafetensorsFolder
from qjax.models import CausalLM

Checkpoint = SafetensorsFolder | GGUFFile

# What a layer calls its arrays -> what the file calls them. Kernels are [in, out], files [out, in].
_SUFFIX = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


def from_pretrained(path_or_id, *, dtype=None, scan_layers: bool = False) -> CausalLM:
    """Load a language model.

    Args:
        path_or_id: a folder with config.json and safetensors, a .gguf file, or a hub id such as
            "HuggingFaceTB/SmolLM2-135M" (through `huggingface_hub`, its cache first).
        dtype: of the weights and of the computation; None takes the checkpoint's (GGUF: float32).
        scan_layers: stack the layers into one and scan over them: compiles much faster.

    Raises:
        ValueError: not a checkpoint, of an unknown family, or tensors missing, left over or of
            another shape than config.json says.
        ModuleNotFoundError: an optional package that this checkpoint needs, with what to install.

    Example:
        >>> model = qjax.from_pretrained("model.gguf")  # doctest: +SKIP
    """
    source = _open(path_or_id)
    model_config = dataclasses.replace(source.config, scan_layers=scan_layers)
    dtype = jnp.dtype(source.dtype if dtype is None else dtype)
    model = nnx.eval_shape(lambda: CausalLM(model_config, dtype=dtype, rngs=nnx.Rngs(0)))
    _check_names(source, model)
    for path, module in list(_layers(model)):
        for leaf, variable in _leaves(module):
            parts = [
                _read(source, name, leaf, variable, scan_layers and path.startswith("layers/"))
                for name in _tensor_names(source, path, leaf)
            ]
            stacked = np.stack(parts) if path in _stacked(source, path) else parts[0]
            variable.set_value(jnp.asarray(stacked, dtype))
    return model
