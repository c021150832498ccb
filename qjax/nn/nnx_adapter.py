"""One adapter of a module put aside while another, or none, is active.

An adapter is made of the `lora_*` attributes of a `LoraLayer`, and of `SavedParam`s: arrays of the
base model, in any module, that it replaces whole. On the shelf none of them is an `nnx.LoRAParam`,
so an optimizer of those trains what is active and nothing else.
"""

from typing import Any

from flax import nnx

from qjax.nn.lora import ADAPTER_LEAVES, LoraConfig

ADAPTER_ATTRIBUTES = ("lora_config", *ADAPTER_LEAVES, "lora_dropout")


class SavedParam(nnx.LoRAParam):
    """In the place of an array of the base, the one that the adapter has (`modules_to_save`)."""


class ShelvedParam(nnx.Variable):
    """An array that is not in use: of another adapter, or of the base."""


class Shelf(nnx.Module):
    """What is not in use of one adapter in one module, or of the base.

    Attributes:
        lora_config: None in a module of which the adapter replaces arrays.
        arrays: name of the attribute -> `ShelvedParam`.
        lora_dropout: None without dropout.
    """

    lora_config: LoraConfig | None = None
    lora_dropout: Any = None

    def __init__(self):
        self.arrays = nnx.Dict()


def has_adapter(module: nnx.Module) -> bool:
    """Return whether a part of the active adapter is in this very module."""
    is_active = isinstance(getattr(module, "lora_a", None), nnx.LoRAParam)
    return is_active or bool(saved_params(module))


def saved_params(module: nnx.Module) -> dict[str, SavedParam]:
    """Return the arrays of the base that the active adapter replaces."""
    return {name: v for name, v in vars(module).items() if isinstance(v, SavedParam)}


def base_param(module: Any, name: str) -> nnx.Variable:
    """Return the base's array, of which a `SavedParam` has taken the place."""
    return module.lora_base.arrays[name]


def save_param(module: Any, name: str, value: Any) -> None:
    """Put the adapter's array in the place of the base's."""
    if not hasattr(module, "lora_base"):
        module.lora_base = Shelf()
    base = getattr(module, name)
    module.lora_base.arrays[name] = ShelvedParam(base.get_raw_value(), **_metadata(base))
    setattr(module, name, SavedParam(value, **_metadata(base)))


def restore_base(module: Any) -> None:
    """Undo `save_param`."""
    for name in saved_params(module):
        base = base_param(module, name)
        setattr(module, name, nnx.Param(base.get_raw_value(), **_metadata(base)))
    if hasattr(module, "lora_base"):
        del module.lora_base


def shelve(module: Any, memo: dict[int, nnx.Variable]) -> None:
    """Put the active adapter of a module, if there is one, on its shelf.

    Args:
        module: any.
        memo: of variables by id, so that what modules share stays shared.
    """
    if not has_adapter(module):
        return
    shelf = Shelf()
    for name in ADAPTER_LEAVES:
        if name in vars(module):
            shelf.arrays[name] = _as(ShelvedParam, getattr(module, name), memo)
            delattr(module, name)
    for name in ("lora_config", "lora_dropout"):
        if name in vars(module):
            setattr(shelf, name, getattr(module, name))
            delattr(module, name)
    for name, value in saved_params(module).items():
        shelf.arrays[name] = _as(ShelvedParam, value, memo)
    restore_base(module)
    if not hasattr(module, "lora_shelf"):
        module.lora_shelf = nnx.Dict()
    module.lora_shelf[module.lora_name] = shelf
    if "lora_name" in vars(module):
        del module.lora_name


def unshelve(module: Any, name: str, memo: dict[int, nnx.Variable]) -> None:
    """Make the adapter of this name active, if the module has a part of it; none must be."""
    shelf = getattr(module, "lora_shelf", {}).get(name)
    if shelf is None:
        return
    for leaf, value in shelf.arrays.items():
        if leaf in ADAPTER_LEAVES:
            setattr(module, leaf, _as(nnx.LoRAParam, value, memo))
        else:
            save_param(module, leaf, value.get_raw_value())
    for attribute in ("lora_config", "lora_dropout"):
        if getattr(shelf, attribute) is not None:
            setattr(module, attribute, getattr(shelf, attribute))
    module.lora_name = name
    discard(module, name)


def settle(module: Any) -> None:
    """Forget all adapters, but keep what the active one has put in the place of base arrays."""
    for name, value in saved_params(module).items():
        setattr(module, name, nnx.Param(value.get_raw_value(), **_metadata(value)))
    for name in ("lora_base", "lora_shelf", "lora_name"):
        if name in vars(module):
            delattr(module, name)


def discard(module: Any, name: str) -> None:
    """Drop the adapter of this name from the module's shelf, if it is there."""
    if name in getattr(module, "lora_shelf", {}):
        del module.lora_shelf[name]
        if not module.lora_shelf:
            del module.lora_shelf


def _as(kind: type[nnx.Variable], value: nnx.Variable, memo: dict[int, nnx.Variable]) -> Any:
    if id(value) not in memo:
        memo[id(value)] = kind(value.get_raw_value(), **_metadata(value))
    return memo[id(value)]


def _metadata(value: nnx.Variable) -> dict[str, Any]:
    return {k: v for k, v in value.get_metadata().items() if k not in ("hijax", "ref")}
