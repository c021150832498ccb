"""The tensors of a PEFT folder matched with a model, and with what its config names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qjax.hf.peft_config import PeftConfig
from qjax.hf.peft_experts import unfuse
from qjax.hf.peft_names import PREFIX, Fused, Names, Tied, tied_tensors
from qjax.hf.peft_part import Part, stacked
from qjax.models.base import Pretrained
from qjax.nn.lora import LoraConfig
from qjax.nn.nnx_param import QuantParam
from qjax.swap.nnx_find import Found

WEIGHTS = "adapter_model.safetensors"
_LORA = re.compile(r"(.+)\.lora_(A|B|magnitude_vector)(?:\.weight)?")

Tensors = Mapping[str, np.ndarray]


class Ready(NamedTuple):
    """An adapter checked against the model, so that nothing can fail half way.

    Attributes:
        layers: those that get an adapter.
        arrays: layer, name of its array, and what the adapter puts in its place.
    """

    layers: list[tuple[Found, LoraConfig, Part]]
    arrays: list[tuple[Any, str, np.ndarray]]


def match(
    tensors: Mapping[str, np.ndarray],
    config: PeftConfig,
    names: Names,
    model: Pretrained,
    folder: Path,
) -> Ready:
    """Match the tensors with the model and with what the config names.

    Raises:
        ValueError, NotImplementedError: as `load_adapter`.
    """
    halves, replaced = _sort(tensors, config, tied_tensors(model), folder)
    parts: dict[str, tuple[Found, dict[tuple[int, ...], tuple[LoraConfig, Part]]]] = {}

    def add(found: Found, index, lora: LoraConfig, part: Part) -> None:
        parts.setdefault(found.path, (found, {}))[1][index] = (lora, part)

    _check_targets(config, names, set(halves), folder)
    experts = expert_names(config, names)
    for name, half in halves.items():
        if name in experts:
            parameter = experts[name]
            lora = config.lora(parameter.name)
            for found, index, part in unfuse(parameter, lora, half, folder):
                add(found, index, lora, part)
        else:
            lora, place = config.lora(name), names.dense[name]
            add(place.found, place.index, lora, Part.read(name, lora, half, folder))
    layers = [(found, *stacked(found, held, folder)) for found, held in parts.values()]
    return Ready(layers, _replacements(replaced, names, model, config, folder))


def _sort(
    tensors: Tensors, config: PeftConfig, tied: Tied | None, folder: Path
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Return the tensors of adapters by module, and those that replace the base's by name."""
    halves: dict[str, dict[str, np.ndarray]] = {}
    replaced: dict[str, np.ndarray] = {}
    head = tied.head if tied and config.ties else None
    for tensor, value in tensors.items():
        inside = tensor.removeprefix(PREFIX)
        lora = _LORA.fullmatch(inside)
        if lora is not None:
            halves.setdefault(lora[1], {})[lora[2]] = value
        elif inside == head or config.saves(inside.rpartition(".")[0]):
            replaced[inside] = value
        else:
            raise ValueError(
                f"{folder / WEIGHTS}: {tensor!r} {list(value.shape)} is no LoRA matrix, and of no "
                "module that modules_to_save names"
            )
    if not halves and not replaced:
        raise ValueError(f"{folder / WEIGHTS} holds no adapter")
    return halves, replaced


def expert_names(config: PeftConfig, names: Names) -> dict[str, Fused]:
    """Return the fused parameters that the config names, as PEFT's nested wrappers are called."""
    nested = {}
    for module, parameters in names.experts.items():
        held = [p for p in parameters if config.targets_parameter(p.name)]
        for depth, parameter in enumerate(reversed(held)):
            nested[module + ".base_layer" * depth] = parameter
    return nested


def _check_targets(config: PeftConfig, names: Names, found: set[str], folder: Path) -> None:
    """Raise ValueError unless the tensors are of the modules that the config names."""
    experts = expert_names(config, names)
    for name in sorted(found - set(experts)):
        if name not in names.dense:
            some = ", ".join(sorted(names.dense)[:4])
            raise ValueError(
                f"{folder}: module {name!r} is no dense layer of this model; it has {some}, ..."
            )
        if not config.targets(name):
            key = {k: config.data.get(k) for k in ("target_modules", "modules_to_save")}
            raise ValueError(f"{folder}: there are tensors of {name!r}, which is not in {key}")
    modules = config.data.get("target_modules") or ()
    wanted = [name for name in names.dense if config.targets(name)]
    if modules and not wanted:
        raise ValueError(
            f"{config.file}: target_modules={modules!r} matches no module of this model; it has "
            f"{', '.join(sorted(names.dense)[:4])}, ..."
        )
    # A list says that all its modules are adapted; a pattern may meet more than PEFT's layers.
    whole = () if isinstance(modules, str) else wanted
    missing = [n for n in whole if n not in found and not names.dense[n].is_expert]
    missing += [n for n in experts if n not in found]
    if missing:
        raise ValueError(f"{folder}: no tensors of {missing[0]!r}, which its config names")


def _replacements(
    replaced: Mapping[str, np.ndarray],
    names: Names,
    model: Pretrained,
    config: PeftConfig,
    folder: Path,
) -> list[tuple[Any, str, np.ndarray]]:
    ready, replaced, tied = [], dict(replaced), tied_tensors(model)
    if tied and config.ties and tied.table in replaced:
        copy = replaced.pop(tied.head, replaced[tied.table])
        if not np.array_equal(copy, replaced[tied.table]):
            raise ValueError(f"{folder}: {tied.head!r} and {tied.table!r} are tied, and differ")
    modules = {name.rpartition(".")[0] for name in replaced}
    whole = {n for n in names.arrays if config.saves(n.rpartition(".")[0])}
    for module in config.data.get("modules_to_save") or ():
        if not any(m == module or m.endswith(f".{module}") for m in modules):
            raise ValueError(f"{folder}: no tensors of modules_to_save={module!r}")
    for name in sorted(whole | set(replaced)):
        array, value = names.arrays.get(name), replaced.get(name)
        if array is None or value is None:
            which = "has no array" if array is None else "needs the tensor"
            raise ValueError(f"{folder}: modules_to_save: this model {which} {name!r}")
        held = getattr(array.layer, array.leaf)
        if isinstance(held, QuantParam):
            raise ValueError(
                f"{folder}: the adapter replaces {name!r}, which is in 4 bits: load the model with "
                "QuantConfig(exclude=...) for it"
            )
        if tied and name == tied.table and not config.ties:
            raise NotImplementedError(
                f"{folder}: the adapter replaces {name!r} but not the output head that is tied to "
                "it (ensure_weight_tying=False); here they are one array"
            )
        if array.where.stack:
            raise NotImplementedError(
                f"{folder}: the adapter replaces {name!r}, which is stacked: load the model with "
                "scan_layers=False"
            )
        value = value.T if array.where.transposed else value
        if value.shape != held.shape:
            raise ValueError(
                f"{folder}: {name!r} must be {list(held.shape)} in this model, got "
                f"{list(value.shape)}"
            )
        ready.append((array.layer, array.leaf, value))
    return ready
