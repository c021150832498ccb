"""Several adapters on one NNX model, by name, of which one or none is active."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from flax import nnx

from qjax.nn.nnx_adapter import discard, has_adapter, shelve, unshelve
from qjax.nn.nnx_foreign import adapters_of


def adapter_names(model: nnx.Module) -> tuple[str, ...]:
    """Return the names of the model's adapters, sorted.

    Example:
        >>> model = qjax.quantize_model(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
        >>> model = qjax.add_lora(model, qjax.LoraConfig(4), rngs=nnx.Rngs(1), name="french")
        >>> adapter_names(model), active_adapter(model)
        (('french',), 'french')
    """
    shelved = {name for m in _modules(model) for name in getattr(m, "lora_shelf", {})}
    active = active_adapter(model)
    return tuple(sorted(shelved | ({active} if active else set())))


def active_adapter(model: nnx.Module) -> str | None:
    """Return the name of the adapter that is in use, None if none is."""
    names = {m.lora_name for m in _modules(model) if has_adapter(m)}
    return names.pop() if names else None


def set_adapter(model: nnx.Module, name: str | None) -> nnx.Module:
    """Make one of the model's adapters the one in use, in place; None: the base model alone.

    Its arrays become `nnx.LoRAParam`s and those of all others cease to be, so an optimizer has to
    be made anew, and compiled functions are traced again.

    Returns:
        The model itself.

    Raises:
        ValueError: there is no adapter of that name.

    Example:
        >>> model = qjax.quantize_model(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
        >>> model = qjax.add_lora(model, qjax.LoraConfig(4), rngs=nnx.Rngs(1))
        >>> set_adapter(model, None).lora_a is None
        True
        >>> set_adapter(model, "default").lora_a.shape
        (64, 4)
    """
    if name is not None:
        _check_known(model, name)
    if name == active_adapter(model):
        return model
    modules, memo = _modules(model), {}
    for module in modules:
        for parameter, _ in adapters_of(module):
            raise NotImplementedError(
                f"{type(module).__name__}.{parameter} is no layer of Flax's, and its adapter "
                "cannot be put aside"
            )
    for module in modules:
        shelve(module, memo)
    for module in modules:
        if name is not None:
            unshelve(module, name, memo)
    return model


def delete_adapter(model: nnx.Module, name: str) -> nnx.Module:
    """Remove an adapter, active or not, in place; the others and the base stay as they are.

    Raises:
        ValueError: there is no adapter of that name.

    Example:
        >>> model = qjax.quantize_model(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
        >>> model = qjax.add_lora(model, qjax.LoraConfig(4), rngs=nnx.Rngs(1))
        >>> adapter_names(delete_adapter(model, "default"))
        ()
    """
    _check_known(model, name)
    if name == active_adapter(model):
        set_adapter(model, None)
    for module in _modules(model):
        discard(module, name)
    return model


@contextlib.contextmanager
def disable_adapter(model: nnx.Module) -> Iterator[None]:
    """Use the base model alone inside, as for the reference of DPO.

    Example:
        >>> model = qjax.quantize_model(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
        >>> model = qjax.add_lora(model, qjax.LoraConfig(4), rngs=nnx.Rngs(1))
        >>> with disable_adapter(model):
        ...     y = model(jnp.ones((1, 64)))
    """
    name = active_adapter(model)
    set_adapter(model, None)
    try:
        yield
    finally:
        set_adapter(model, name)


def check_name(model: nnx.Module, name: str) -> None:
    """Raise ValueError for the name of an adapter that is put aside, or for no plain word."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"name={name!r} of an adapter must be letters, digits, '_' and '-'")
    if name != active_adapter(model) and name in adapter_names(model):
        raise ValueError(f"the model has an adapter {name!r} already; see set_adapter")


def _check_known(model: nnx.Module, name: str) -> None:
    known = adapter_names(model)
    if name not in known:
        raise ValueError(f"name={name!r}: the model's adapters are {list(known)}")


def _modules(model: nnx.Module) -> list[Any]:
    return [module for _, module in nnx.iter_modules(model, graph=True)]
