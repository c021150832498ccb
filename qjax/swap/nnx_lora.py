"""add_lora: adapters for the layers of an NNX model."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from qjax.core.config import check_config
from qjax.core.qtensor import QTensor
from qjax.nn.lora import LoraConfig
from qjax.nn.nnx_adapter import save_param, saved_params
from qjax.nn.nnx_param import QuantParam
from qjax.ops.lora_init import loftq, pissa
from qjax.swap.nnx_adapters import active_adapter, check_name, set_adapter
from qjax.swap.nnx_find import Found
from qjax.swap.nnx_raw import Raw, find_weights
from qjax.swap.policy import check_patterns, matches

# A float model of the same structure, or what gives the float array of a weight's path.
Source = nnx.Module | Callable[[str], Any]


def add_lora(
    model: nnx.Module,
    cfg: LoraConfig,
    *,
    rngs: nnx.Rngs,
    dtype: Any = jnp.float32,
    name: str = "default",
    source: Source | None = None,
) -> nnx.Module:
    """Give layers adapters, in place: `nnx.LoRAParam`s `lora_a` and `lora_b` beside the weight.

    Where the model has adapters of another name, they are put aside first (`qjax.set_adapter`).

    `init="pissa"` and `init="loftq"` begin with an adapter that makes up for what quantization
    lost. They read the float weights, from `source` and one at a time, and put other 4-bit weights
    in the place of the model's own (LoftQ with one iteration does not).

    Args:
        model: any module.
        cfg: size, and which layers: without an include pattern every quantized one. A pattern may
            also name dense layers that were left in floating point, such as the output head.
        rngs: its "params" stream gives A, its "dropout" stream the masks.
        dtype: of A and B.
        name: of the adapter.
        source: for those inits, a float model of the same structure, or a function from the path of
            a weight, such as "layers/0/mlp/up_proj/kernel", to its array (`qjax.float_weights`).

    Returns:
        The model itself.

    Raises:
        TypeError: not an NNX module, cfg no LoraConfig, or rngs no nnx.Rngs.
        ValueError: no quantized layer, an include pattern that matches no dense layer, a layer that
            has an adapter already, or one whose own code would not use it; modules_to_save that
            match nothing, or a 4-bit weight; a source where none is needed, none where one is, or
            one that does not fit.
        NotImplementedError: DoRA for an embedding.

    Example:
        >>> model = qjax.quantize_model(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
        >>> model = qjax.add_lora(model, qjax.LoraConfig(rank=4), rngs=nnx.Rngs(1))
        >>> model.lora_a.shape, model.lora_b.shape
        ((64, 4), (4, 8))
    """
    check_config(cfg, LoraConfig)
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs must be an nnx.Rngs, got {type(rngs).__name__}")
    saved = _modules_to_save(model, cfg)
    found = [f for f in _chosen(model, cfg) if id(f.layer) not in saved]
    weights = _weights(cfg, source)
    check_name(model, name)
    for f in found:
        _check_adapter(f, cfg, name, taken=name == active_adapter(model))
    if name != active_adapter(model):
        set_adapter(model, None)
    for f in found:
        mine = cfg.at(f.path)
        arrays = None if weights is None else _init_from(weights, f, mine, rngs)
        f.add_adapter(mine, rngs, dtype, arrays)
        if isinstance(f, Found):
            f.layer.lora_name = name
    for module, leaves in saved.values():
        for leaf in leaves:
            save_param(module, leaf, getattr(module, leaf).get_raw_value())
        module.lora_name = name
    return model


def _chosen(model: nnx.Module, cfg: LoraConfig) -> list[Found | Raw]:
    """Return the weights that the patterns choose."""
    found = find_weights(model)
    check_patterns(cfg, [name for f in found for name in _names(f)], "dense layer")
    if cfg.include is None:
        found = [f for f in found if f.is_quantized]
        if not found:
            raise ValueError(
                "no layer is in 4 bits, so none takes an adapter by default: call quantize_model, "
                "or name float layers by include="
            )
    else:
        found = [f for f in found if any(matches(name, cfg.include) for name in _names(f))]
    return [f for f in found if not any(matches(name, cfg.exclude) for name in _names(f))]


def _names(f: Found | Raw) -> tuple[str, ...]:
    """Return what the patterns of a LoraConfig are searched in; a module may have many weights."""
    return (f.path, f.weight_path) if isinstance(f, Raw) else (f.path,)


def _check_adapter(f: Found | Raw, cfg: LoraConfig, name: str, *, taken: bool) -> None:
    f.check_adapter(cfg)
    if isinstance(f, Raw) and name != "default":
        raise NotImplementedError(
            f"{f.weight_path}: name={name!r} for a parameter of {type(f.layer).__name__}, which is "
            "no layer of Flax's and has one adapter, 'default'; leave it out by exclude="
        )
    if f.is_adapted and (taken or isinstance(f, Raw)):
        path = f.weight_path if isinstance(f, Raw) else f.path
        raise ValueError(
            f"{path} has an adapter already; merge_lora ends it, and name= adds one beside it"
        )


def _modules_to_save(model: nnx.Module, cfg: LoraConfig) -> dict[int, tuple[Any, list[str]]]:
    """Return the modules that `modules_to_save` names, by id, with their arrays' names."""
    modules = [("/".join(map(str, path)), m) for path, m in nnx.iter_modules(model)]
    saved = {}
    for pattern in cfg.modules_to_save or ():
        hits = [(path, module) for path, module in modules if matches(path, [pattern])]
        for path, module in hits:
            kinds = {leaf: v for leaf, v in vars(module).items() if isinstance(v, nnx.Variable)}
            if any(isinstance(v, QuantParam) for v in kinds.values()):
                raise ValueError(
                    f"modules_to_save={pattern!r}: {path} is in 4 bits; exclude it in QuantConfig"
                )
            leaves = [leaf for leaf, v in kinds.items() if type(v) is nnx.Param]
            if leaves and not saved_params(module):
                saved[id(module)] = (module, leaves)
        if not any(id(module) in saved for _, module in hits):
            raise ValueError(f"modules_to_save={pattern!r} matches no module with float arrays")
    return saved


def _weights(cfg: LoraConfig, source: Source | None) -> Callable[[str], Any] | None:
    cfg.check_source(source)
    if source is None or not isinstance(source, nnx.Module):
        return source
    held = {f.weight_path: f.weight for f in find_weights(source)}

    def read(path: str) -> Any:
        if path not in held or isinstance(held[path], QuantParam):
            raise ValueError(f"source has no float weight {path}")
        return held[path].get_raw_value()

    return read


def _init_from(weights, f: Found | Raw, cfg: LoraConfig, rngs: nnx.Rngs) -> tuple[Any, Any]:
    """Put another weight in the place of f's, and return the adapter that makes up for it."""
    base, w = f.weight.get_raw_value(), jnp.asarray(weights(f.weight_path))
    if tuple(w.shape) != tuple(base.shape):
        raise ValueError(f"source: {f.weight_path} must be {list(base.shape)}, got {list(w.shape)}")
    if cfg.init == "loftq" and not isinstance(base, QTensor):
        raise ValueError(f"{f.path}: init='loftq' makes up for quantization; it is in float")
    axes = f.axes()
    batch_ndim = len(w.shape) - len(axes.shape) + axes.batch_ndim
    args = (w, base, cfg.rank, cfg.scaling, axes.contract_axes, batch_ndim, rngs.params())
    new, a, b = pissa(*args) if cfg.init == "pissa" else loftq(*args, cfg.loftq_iterations)
    f.weight.set_value(new)
    return a, b
