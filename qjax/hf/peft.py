"""PEFT adapters: adapter_config.json and adapter_model.safetensors, read and written.

A tensor is `base_model.model.<module>.lora_A.weight` [rank, in], `.lora_B.weight` [out, rank] or
`.lora_magnitude_vector` [out], with Hugging Face's name of the module, or one that the adapter puts
in the place of the base's, under its own name. Source: peft 0.21, utils/save_and_load.py.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qjax.hf.extras import write_whole
from qjax.hf.peft_config import NAME as _CONFIG
from qjax.hf.peft_config import PeftConfig, config_json
from qjax.hf.peft_experts import fuse
from qjax.hf.peft_match import WEIGHTS, expert_names, match
from qjax.hf.peft_names import PREFIX, Fused, known_family, peft_names, saved_arrays, tied_tensors
from qjax.hf.peft_part import Part
from qjax.models import MaskedLM, Seq2SeqLM
from qjax.models.base import Pretrained
from qjax.models.fuse import refuse_fused
from qjax.nn.lora import LoraConfig
from qjax.nn.nnx_adapter import save_param
from qjax.nn.nnx_layer import LoraLayer
from qjax.swap.nnx_adapters import adapter_names, check_name, set_adapter
from qjax.swap.nnx_find import Found, find_layers


def load_adapter(model: Pretrained, path, *, name: str = "default") -> Pretrained:
    """Give a model the adapter of a PEFT folder, in place, and make it the active one.

    LoRA, rsLoRA and DoRA, with patterns of ranks and alphas, adapters of fused experts
    (`target_parameters`) and modules that the adapter replaces (`modules_to_save`). Dropout is off
    until `model.train()`.

    Args:
        model: the base, in float or in 4 bits. Adapters of other names are put aside.
        path: a folder with adapter_config.json and adapter_model.safetensors.
        name: what to call it here, for `qjax.set_adapter`.

    Returns:
        The model itself; nothing of it is changed if there is an error.

    Raises:
        ValueError: not such a folder, an adapter of another base, or one whose tensors are not
            those that its config names.
        NotImplementedError: a kind of adapter other than these.
    """
    refuse_fused(model, "load_adapter")
    folder = Path(path).expanduser()
    config = PeftConfig.read(folder)
    check_name(model, name)
    if name in adapter_names(model):
        raise ValueError(
            f"the model has an adapter {name!r} already: merge_lora ends it, and name= loads "
            "another beside it"
        )
    names = peft_names(model)
    ready = match(_read_tensors(folder / WEIGHTS), config, names, model, folder)
    set_adapter(model, None)
    for found, lora, part in ready.layers:
        _attach(found, lora, part, name)
    for parameter in expert_names(config, names).values():
        _share(parameter)
    for layer, leaf, value in ready.arrays:
        save_param(layer, leaf, jnp.asarray(value, getattr(layer, leaf).dtype))
        layer.lora_name = name
    return model


def save_adapter(model: Pretrained, path, *, base_model: str | None = None) -> None:
    """Write the active adapter of a model as a folder that PEFT loads.

    Args:
        model: with adapters on dense layers or experts.
        path: the folder, made if it is missing.
        base_model: name or path of the base, for `base_model_name_or_path`. Needed after
            `init="pissa"` and `"loftq"` with several iterations, whose base is not the original:
            write it with `save_pretrained` and give its path.

    Raises:
        ValueError: the model has no adapter, one on a weight that PEFT has no layer for, or on a
            base that `base_model` has to name.
    """
    refuse_fused(model, "save_adapter")
    names = peft_names(model)
    every = {f.path: f.layer for f in find_layers(model) if _config(f) is not None}
    replaced = saved_arrays(names)
    if not every and not replaced:
        raise ValueError("the model has no adapter")
    changed = [path for path, layer in every.items() if layer.lora_config.changes_base]
    if changed and base_model is None:
        raise ValueError(
            f"init={every[changed[0]].lora_config.init!r} has changed the base weight of "
            f"{changed[0]!r}: write the base with save_pretrained and name it by base_model="
        )
    tensors, configs, written = {}, {}, set()
    for module, place in names.dense.items():
        if place.is_expert or (lora := _config(place.found)) is None:
            continue
        configs[module] = lora
        written.add(place.found.path)
        _write(tensors, module, Part.of(place.found.layer, place.index))
    fused = {}
    for module, parameters in names.experts.items():
        held = [p for p in parameters if any(_config(f) is not None for f in p.parts)]
        for depth, parameter in enumerate(reversed(held)):
            fused[parameter.name], part = fuse(parameter)
            written |= {f.path for f in parameter.parts}
            _write(tensors, module + ".base_layer" * depth, part)
    if left := sorted(set(every) - written):
        raise ValueError(f"PEFT has no place for the adapter of {left[0]!r}")
    for tensor, array in replaced.items():
        value = np.asarray(getattr(array.layer, array.leaf)[...])[array.index]
        value = value.T if array.where.transposed else value
        tensors[PREFIX + tensor] = np.ascontiguousarray(value)
    tied = tied_tensors(model)
    if tied and tied.table in replaced:
        tensors[PREFIX + tied.head] = tensors[PREFIX + tied.table]
    modules = {m for m, place in names.dense.items() if not place.is_expert}
    saved = {tensor.rpartition(".")[0] for tensor in replaced}
    data = config_json(configs | fused, modules, fused, saved) | {
        "base_model_name_or_path": base_model,
        "ensure_weight_tying": bool(tied and tied.table in replaced),
        "fan_in_fan_out": known_family(model).conv1d,
        "task_type": _task_type(model),
    }
    folder = Path(path).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / WEIGHTS, lambda f: save_file(tensors, f, metadata={"format": "pt"}))
    text = json.dumps(data, indent=2, sort_keys=True)
    write_whole(folder / _CONFIG, lambda f: f.write_text(text, encoding="utf-8"))


def _task_type(model: Pretrained) -> str | None:
    """Return what PEFT wraps the model as; for a masked language model it has only None."""
    if isinstance(model, MaskedLM):
        return None
    return "SEQ_2_SEQ_LM" if isinstance(model, Seq2SeqLM) else "CAUSAL_LM"


def _config(found: Found) -> LoraConfig | None:
    layer: Any = found.layer
    return layer.lora_config if getattr(layer, "lora_a", None) is not None else None


def _write(tensors: dict[str, np.ndarray], module: str, part: Part) -> None:
    name = f"{PREFIX}{module}.lora_"
    tensors[f"{name}A.weight"] = np.ascontiguousarray(part.a.T)
    tensors[f"{name}B.weight"] = np.ascontiguousarray(part.b.T)
    if part.magnitude is not None:
        tensors[f"{name}magnitude_vector"] = np.ascontiguousarray(part.magnitude)


def _read_tensors(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}")
    try:
        with safe_open(file, framework="numpy") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from None


def _attach(found: Found, config: LoraConfig, part: Part, name: str) -> None:
    layer: Any = found.layer
    if not isinstance(layer, LoraLayer):
        layer.__class__ = found.cls.lora_class
    arrays = [None if a is None else jnp.asarray(a) for a in part]
    layer.put_adapter(config, *arrays, rngs=nnx.Rngs(0))
    if layer.lora_dropout is not None:
        layer.lora_dropout.deterministic = True
    layer.lora_name = name


def _share(parameter: Fused) -> None:
    """Give our layers of one parameter in PEFT its one A: Mixtral's gate and up projections."""
    first: Any = parameter.parts[0].layer
    for found in parameter.parts[1:]:
        layer: Any = found.layer
        layer.lora_a = first.lora_a
