"""adapter_config.json: what of it is read, which modules it names, and how it is written.

Source: peft 0.21, tuners/tuners_utils.py (check_target_module_exists) and utils/other.py.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qjax.hf.safetensors import read_json
from qjax.nn.lora import LoraConfig

NAME = "adapter_config.json"
# Keys that say nothing of the adapter as it is used, or only what `init_lora_weights` turns on.
_NEUTRAL = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("peft_version", "loftq_config", "corda_config", "eva_config", "lora_ga_config"),
    *("fan_in_fan_out", "megatron_config", "megatron_core", "qalora_group_size"),
    *("runtime_config", "kasa_config"),
}
_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern"),
    *("alpha_pattern", "bias", "modules_to_save", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "target_parameters", "init_lora_weights"),
    "ensure_weight_tying",
}
_TYPES = {
    "target_modules": (list, str),
    "exclude_modules": (list, str),
    "modules_to_save": (list,),
    "target_parameters": (list,),
    "layers_to_transform": (list, int),
    "layers_pattern": (list, str),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
}
# Inits after which the base is as it was; PEFT repeats the others when it loads the adapter.
_PLAIN_INITS = (True, False, None, "gaussian", "eva")
_INDEX = r".*?\.[^.]*\.(\d+)\."  # the first number in a module's name


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """An adapter_config.json, checked.

    Attributes:
        data: its contents.
        file: its path, for errors.
    """

    data: Mapping[str, Any]
    file: Path

    @classmethod
    def read(cls, folder: Path) -> "PeftConfig":
        """Read a folder's.

        Raises:
            ValueError: there is none, or a value of it is out of range.
            NotImplementedError: it asks for what is not implemented, by name.
        """
        config = cls(read_json(folder / NAME), folder / NAME)
        config._check()
        return config

    def _check(self) -> None:
        data = self.data
        if data.get("peft_type") != "LORA":
            self._refuse("peft_type", "only 'LORA'")
        for key, value in data.items():
            if key not in _READ | _NEUTRAL and value not in (None, False, {}, []):
                self._refuse(key, "not implemented")
        if data.get("bias") not in ("none", None):
            self._refuse("bias", "not implemented")
        if data.get("init_lora_weights", True) not in _PLAIN_INITS:
            self._refuse(
                "init_lora_weights",
                "PEFT computes another base from it; its save_pretrained converts such an adapter "
                "by path_initial_model_for_weight_conversion",
            )
        for key, kinds in _TYPES.items():
            if not isinstance(data.get(key), (*kinds, type(None))):
                raise ValueError(f"{self.file}: {key}={data[key]!r} has the wrong type")
        for key in ("target_modules", "exclude_modules"):
            if isinstance(data.get(key), str):
                try:
                    re.compile(data[key])
                except re.error as error:
                    raise ValueError(f"{self.file}: {key}={data[key]!r}: {error}") from None
        self.lora("")

    def _refuse(self, key: str, why: str) -> None:
        raise NotImplementedError(f"{self.file}: {key}={self.data.get(key)!r}: {why}")

    def lora(self, name: str) -> LoraConfig:
        """Return the LoraConfig of a module, or of a parameter of experts.

        Raises:
            ValueError: a field is out of range.
        """
        data = self.data
        try:
            return LoraConfig(
                rank=_pattern(data.get("rank_pattern"), name, data.get("r", 8)),
                alpha=_pattern(data.get("alpha_pattern"), name, data.get("lora_alpha", 8)),
                dropout=data.get("lora_dropout") or 0.0,
                rslora=bool(data.get("use_rslora")),
                dora=bool(data.get("use_dora")),
            )
        except (TypeError, ValueError, re.error) as error:
            raise ValueError(f"{self.file}: {error}") from None

    def targets(self, name: str, entry: str | None = None) -> bool:
        """Return whether the config names this module for an adapter.

        Args:
            name: of a dense layer, as in the checkpoint.
            entry: one of a list of `target_modules`, to ask for that alone.
        """
        data = self.data
        if _listed(data.get("exclude_modules") or (), name) or self.saves(name):
            return False
        modules = data.get("target_modules") or ()
        if isinstance(modules, str):
            is_head = name.rpartition(".")[2] in ("lm_head", "embed_out")
            return not is_head if self.all_linear else bool(re.fullmatch(modules, name))
        return _listed(modules if entry is None else [entry], name) and self._in_layers(name)

    @property
    def all_linear(self) -> bool:
        """Whether every dense layer but the head is named."""
        return str(self.data.get("target_modules")).lower() == "all-linear"

    def targets_parameter(self, name: str) -> bool:
        """Return whether the config names this parameter, of a module of experts."""
        return _listed(self.data.get("target_parameters") or (), name)

    def saves(self, name: str) -> bool:
        """Return whether the adapter replaces this module."""
        return _listed(self.data.get("modules_to_save") or (), name)

    @property
    def ties(self) -> bool:
        """Whether what replaces the embeddings replaces the output head that is tied to them."""
        return bool(self.data.get("ensure_weight_tying"))

    def _in_layers(self, name: str) -> bool:
        wanted, patterns = self.data.get("layers_to_transform"), self.data.get("layers_pattern")
        if wanted in (None, []):
            return True
        patterns = [patterns] if isinstance(patterns, str) else patterns
        regexes = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] if patterns else [_INDEX]
        match = next(filter(None, (re.match(r, name) for r in regexes)), None)
        return bool(match) and int(match[1]) in ([wanted] if isinstance(wanted, int) else wanted)


def _listed(modules: Collection[str] | str, name: str) -> bool:
    """Return whether a name, or an end of it, is in a list, or matches a regular expression."""
    if isinstance(modules, str):
        return bool(re.fullmatch(modules, name))
    return any(name == m or name.endswith(f".{m}") for m in modules)


def _pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def config_json(
    configs: Mapping[str, LoraConfig],
    modules: Collection[str],
    parameters: Collection[str] = (),
    saved: Collection[str] = (),
) -> dict[str, Any]:
    """Return what an adapter_config.json says of an adapter's own.

    Args:
        configs: of every module and parameter that is adapted, by name.
        modules: names of all dense layers.
        parameters: those of `configs` that are parameters of experts.
        saved: modules that the adapter replaces.

    Raises:
        ValueError: configs that one file cannot hold.
    """
    common = {(c.rslora, c.dropout, c.dora) for n, c in configs.items() if n not in parameters}
    if len(common | {(c.rslora, c.dropout, c.dora) for c in configs.values()}) > 1:
        raise ValueError("adapters with different rslora, dropout or dora: PEFT has one for all")
    first = next(iter(configs.values()), LoraConfig(rank=8, alpha=8))
    rank = Counter(c.rank for c in configs.values() or [first]).most_common(1)[0][0]
    alpha = Counter(c.alpha for c in configs.values() or [first]).most_common(1)[0][0]
    return {
        "alpha_pattern": {n: c.alpha for n, c in configs.items() if c.alpha != alpha},
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "modules_to_save": sorted(saved) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {n: c.rank for n, c in configs.items() if c.rank != rank},
        "target_modules": _target_modules(set(configs) - set(parameters), set(modules)),
        "target_parameters": sorted(parameters) or None,
        "use_dora": first.dora,
        "use_rslora": first.rslora,
    }


def _target_modules(adapted: set[str], modules: set[str]) -> list[str]:
    """Return the last part of names where all modules with it are adapted, else whole names."""
    last = {name: name.rpartition(".")[2] for name in modules}
    partly = {last[name] for name in modules - adapted}
    return sorted({last[n] if last[n] not in partly else n for n in adapted})
