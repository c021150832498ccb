"""PEFT adapters: adapter_config.json and adapter_model.safetensors, read and written.

A tensor is `base_model.model.<module>.lora_A.weight` [rank, in] or `.lora_B.weight` [out, rank],
with Hugging Face's name of the module. Source: peft 0.21, utils/save_and_load.py.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qjax.hf.extras import write_whole
from qjax.hf.families import family
from qjax.hf.layout import arrays, stored
from qjax.hf.safetensors import read_json
from qjax.models import Seq2SeqLM
from qjax.models.base import Pretrained
from qjax.models.fuse import refuse_fused
from qjax.nn.lora import LoraConfig
from qjax.nn.nnx_layer import LoraLayer
from qjax.swap.nnx_find import Found, find_layers

_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Keys that name, pick or initialize what the tensors themselves then show.
_NEUTRAL = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("peft_version", "init_lora_weights", "loftq_config", "corda_config", "eva_config"),
    *("lora_ga_config", "target_modules", "exclude_modules", "layers_pattern"),
    *("layers_to_transform", "fan_in_fan_out", "megatron_config", "megatron_core"),
    *("qalora_group_size", "runtime_config", "ensure_weight_tying", "kasa_config"),
}
_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "bias", "modules_to_save"),
}


class Target(NamedTuple):
    """A dense layer under Hugging Face's name; one of several where layers are stacked."""

    found: Found
    index: tuple[int, ...]  # in the stacked axes of the layer


class Adapter(NamedTuple):
    """What a file holds for one module."""

    config: LoraConfig
    a: np.ndarray  # [in, rank]
    b: np.ndarray  # [rank, out]


def load_adapter(model: Pretrained, path) -> Pretrained:
    """Give a model the adapter of a PEFT folder, in place: LoRA or rsLoRA, with patterns.

    Args:
        model: the base, in float or in 4 bits, without an adapter.
        path: a folder with adapter_config.json and adapter_model.safetensors.

    Returns:
        The model itself; nothing of it is changed if there is an error.

    Raises:
        ValueError: not such a folder, or an adapter of another base.
        NotImplementedError: a kind of adapter other than these.
    """
    refuse_fused(model, "load_adapter")
    folder = Path(path).expanduser()
    config = read_json(folder / _CONFIG)
    _check_config(config, folder / _CONFIG)
    tensors = _read_tensors(folder / _WEIGHTS)
    adapters = _parse(tensors, config, folder)
    targets = _targets(model)
    layers: dict[str, tuple[Found, dict[tuple[int, ...], Adapter]]] = {}
    for name, adapter in adapters.items():
        if name not in targets:
            raise ValueError(
                f"{folder}: module {name!r} is no dense layer of this model; "
                f"it has {', '.join(sorted(targets)[:4])}, ..."
            )
        found, index = targets[name]
        layers.setdefault(found.path, (found, {}))[1][index] = adapter
    ready = [(found, *_stacked(found, parts, folder)) for found, parts in layers.values()]
    for found, adapter_config, a, b in ready:
        _attach(found, adapter_config, a, b)
    return model


def save_adapter(model: Pretrained, path, *, base_model: str | None = None) -> None:
    """Write the adapter of a model as a folder that PEFT loads.

    Args:
        model: with adapters on dense layers.
        path: the folder, made if it is missing.
        base_model: name or path of the base, for `base_model_name_or_path`.

    Raises:
        ValueError: the model has no adapter, or one on a weight that PEFT has no layer for.
    """
    refuse_fused(model, "save_adapter")
    targets = _targets(model)
    held = {n: t for n, t in targets.items() if getattr(t.found.layer, "lora_a", None) is not None}
    every = [f for f in find_layers(model) if getattr(f.layer, "lora_a", None) is not None]
    if not every:
        raise ValueError("the model has no adapter")
    if left := {f.path for f in every} - {t.found.path for t in held.values()}:
        raise ValueError(f"PEFT has no place for the adapter of {sorted(left)[0]!r}")
    tensors, configs = {}, {}
    for name, (found, index) in held.items():
        layer: Any = found.layer
        configs[name] = layer.lora_config
        a, b = np.asarray(layer.lora_a[...][index]), np.asarray(layer.lora_b[...][index])
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(b.T)
    data = _config_json(configs, set(targets)) | {
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": family(json.loads(model.config_json or "{}")).conv1d,
        "task_type": "SEQ_2_SEQ_LM" if isinstance(model, Seq2SeqLM) else "CAUSAL_LM",
    }
    folder = Path(path).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / _WEIGHTS, lambda f: save_file(tensors, f, metadata={"format": "pt"}))
    text = json.dumps(data, indent=2, sort_keys=True)
    write_whole(folder / _CONFIG, lambda f: f.write_text(text, encoding="utf-8"))


def _check_config(config: Mapping[str, Any], file: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise NotImplementedError(f"{file}: peft_type={config.get('peft_type')!r}; only 'LORA'")
    for key, value in config.items():
        if key not in _READ | _NEUTRAL and value not in (None, False, {}, []):
            raise NotImplementedError(f"{file}: {key}={value!r} is not implemented")
    for key, plain in (("bias", ("none", None)), ("modules_to_save", (None, []))):
        if config.get(key) not in plain:
            raise NotImplementedError(f"{file}: {key}={config[key]!r} is not implemented")


def _read_tensors(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}")
    try:
        with safe_open(file, framework="numpy") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from None


def _parse(tensors, config: Mapping[str, Any], folder: Path) -> dict[str, Adapter]:
    """Return the adapter of each module, by name, checked against its config."""
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if match is None or value.ndim != 2:
            raise ValueError(f"{folder / _WEIGHTS}: {name!r} {list(value.shape)} is no LoRA matrix")
        halves.setdefault(match[1], {})[match[2]] = value
    if not halves:
        raise ValueError(f"{folder / _WEIGHTS} holds no adapter")
    adapters = {}
    for name, pair in halves.items():
        rank = _pattern(config.get("rank_pattern"), name, config.get("r", 8))
        alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
            shapes = {half: list(value.shape) for half, value in sorted(pair.items())}
            raise ValueError(
                f"{folder}: {name!r} has {shapes}, must be A [{rank}, in] and B [out, {rank}]"
            )
        lora = LoraConfig(
            rank=rank,
            alpha=alpha,
            dropout=config.get("lora_dropout", 0.0),
            rslora=config.get("use_rslora", False),
        )
        adapters[name] = Adapter(lora, pair["A"].T, pair["B"].T)
    return adapters


def _pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _targets(model: Pretrained) -> dict[str, Target]:
    """Return the dense layers by Hugging Face's names."""
    if model.config_json is None:
        raise ValueError(
            "the model was not loaded from a folder: its modules have no names in PEFT"
        )
    known = family(json.loads(model.config_json))
    found = {id(f.layer): f for f in find_layers(model)}
    targets = {}
    for path, layer, leaf in arrays(model):
        if leaf != "kernel" or not isinstance(layer, nnx.Linear):
            continue
        where = stored(known, model.config, path, layer, leaf)
        for i, name in enumerate(where.names):
            index = tuple(int(n) for n in np.unravel_index(i, where.stack)) if where.stack else ()
            targets[name.removesuffix(".weight")] = Target(found[id(layer)], index)
    return targets


def _stacked(found: Found, parts: Mapping[tuple[int, ...], Adapter], folder: Path):
    """Return one config, A and B for a layer, checked; layers of a stack without one get zeros."""
    if getattr(found.layer, "lora_a", None) is not None:
        raise ValueError(f"{found.path} has an adapter already; merge_lora ends it")
    configs = {adapter.config for adapter in parts.values()}
    if len(configs) > 1:
        raise ValueError(
            f"{folder}: the stacked layers {found.path!r} have adapters of different rank or "
            "alpha; load the model with scan_layers=False"
        )
    config = configs.pop()
    weight = found.weight.shape
    stack, (fan_in, out) = weight[:-2], weight[-2:]
    a = np.zeros((*stack, fan_in, config.rank), np.float32)
    b = np.zeros((*stack, config.rank, out), np.float32)
    for index, adapter in parts.items():
        if adapter.a.shape[0] != fan_in or adapter.b.shape[1] != out:
            raise ValueError(
                f"{folder}: the adapter of {found.path!r} is for a layer of "
                f"[{adapter.a.shape[0]}, {adapter.b.shape[1]}], this model's is [{fan_in}, {out}]"
            )
        a[index], b[index] = adapter.a.astype(np.float32), adapter.b.astype(np.float32)
    return config, a, b


def _attach(found: Found, config: LoraConfig, a: np.ndarray, b: np.ndarray) -> None:
    layer: Any = found.layer
    if not isinstance(layer, LoraLayer):
        layer.__class__ = found.cls.lora_class
    layer.init_adapter(config, nnx.Rngs(0))
    layer.lora_a, layer.lora_b = nnx.LoRAParam(jnp.asarray(a)), nnx.LoRAParam(jnp.asarray(b))


def _config_json(configs: Mapping[str, LoraConfig], modules: set[str]) -> dict[str, Any]:
    rank = Counter(c.rank for c in configs.values()).most_common(1)[0][0]
    alpha = Counter(c.alpha for c in configs.values()).most_common(1)[0][0]
    if len({(c.rslora, c.dropout) for c in configs.values()}) > 1:
        raise ValueError("adapters with different rslora or dropout have no place in one PEFT file")
    first = next(iter(configs.values()))
    return {
        "alpha_pattern": {n: c.alpha for n, c in configs.items() if c.alpha != alpha},
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {n: c.rank for n, c in configs.items() if c.rank != rank},
        "target_modules": _target_modules(set(configs), modules),
        "use_rslora": first.rslora,
    }


def _target_modules(adapted: set[str], modules: set[str]) -> list[str]:
    """Return the last part of names where all modules with it are adapted, else whole names."""
    last = {name: name.rpartition(".")[2] for name in modules}
    partly = {last[name] for name in modules - adapted}
    return sorted({last[n] if last[n] not in partly else n for n in adapted})
