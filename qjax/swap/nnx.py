"""NNX surgery: the layers of a model to 4 bits.

A layer changes its class in place (see `qjax.nn.nnx_layer`), so every reference to it, shared ones
too, stays good, and its float weight is freed before the next layer is touched.
"""

import math
import warnings
from collections import defaultdict

from flax import nnx

from qjax.core.config import QuantConfig
from qjax.nn.nnx_embed import QuantEmbed
from qjax.nn.nnx_layer import quantize_weight, stacked_ndim
from qjax.nn.nnx_param import SKIPPED, QuantParam
from qjax.swap.nnx_find import Found, find_layers
from qjax.swap.policy import check_patterns, skip_reason

DEFAULT = QuantConfig()


def quantize_model(model: nnx.Module, cfg: QuantConfig = DEFAULT) -> nnx.Module:
    """Quantize the dense layers of an NNX model to 4 bits, in place.

    `nnx.Linear`, `LinearGeneral`, `Einsum` (so `MultiHeadAttention` too) and, where an include
    pattern asks for it, `Embed` become `qjax.nnx` layers under the same paths. Shared layers stay
    shared; layers stacked by `nnx.vmap` are quantized slice by slice. A subclass with code of its
    own keeps its class and reads its weight decoded, with a warning. By default embeddings, norms,
    routers and the output head stay in floating point; `qjax.report` says what stayed and why.

    Args:
        model: any module; its arrays may be abstract (`nnx.eval_shape`).
        cfg: which weights and how; patterns are searched in paths such as
            "layers/0/attn/query/kernel".

    Returns:
        The model itself.

    Raises:
        TypeError: not an NNX module; a weight is not floating.
        ValueError: the model has no dense layer, an include pattern matches none of them, or a
            weight, named by path, holds NaN or inf.

    Example:
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.relu)
        >>> model = quantize_model(model)
        >>> model.layers[0].kernel.q.bits_per_param
        4.140625
    """
    found = list(find_layers(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no dense layer to quantize")
    check_patterns(cfg, [f.weight_path for f in found], "weight of a dense layer")
    todo = [f for f in found if not f.is_quantized]
    reasons = _reasons(todo, cfg) | _normalized(model)
    shared: dict[int, QuantParam] = {}
    decoded = []
    for f in todo:
        if reasons[f.path]:
            f.weight.set_metadata(SKIPPED, reasons[f.path])
            continue
        if not f.runs_fused:
            decoded.append(f.weight_path)
        _quantize(f, cfg.at(f.weight_path), shared)
    if decoded:
        warnings.warn(
            "these layers have code or products of their own, and decode their whole 4-bit weight "
            f"at each call: {', '.join(decoded)}",
            stacklevel=2,
        )
    return model


def _reasons(found: list[Found], cfg: QuantConfig) -> dict[str, str | None]:
    """Return, for each layer's path, why its weight stays as it is, or None."""
    reasons = {f.path: _reason(f, cfg) for f in found}
    sharing = defaultdict(list)
    for f in found:
        sharing[id(f.weight)].append(f)
    for group in sharing.values():
        kept = [f for f in group if reasons[f.path]]
        uses = {(f.cls, f.runs_fused) for f in group}
        for f in group:
            other = next((o for o in kept or group if o is not f), None)
            if not reasons[f.path] and other and (kept or len(uses) > 1):
                reasons[f.path] = f"shares its array with {other.weight_path}" + (
                    ", which is kept" if kept else ", which uses it in another way"
                )
    return reasons


def _normalized(model: nnx.Module) -> dict[str, str | None]:
    """Return a reason for each layer whose weight a wrapper of Flax's writes at every call."""
    modules = dict(nnx.iter_modules(model, graph=True))
    wrappers = [m for m in modules.values() if isinstance(m, nnx.WeightNorm | nnx.SpectralNorm)]
    inside = {id(wrapper.layer_instance) for wrapper in wrappers}
    return {
        "/".join(map(str, path)): "its weight is normalized at each call"
        for path, module in modules.items()
        if id(module) in inside
    }


def _reason(f: Found, cfg: QuantConfig) -> str | None:
    try:
        axes = f.cls.weight_axes(f.layer)
        stacked_ndim(tuple(f.weight.shape), axes, f.weight_path)
    except (ValueError, AttributeError) as error:  # a subclass may lack Flax's attributes
        return skip_reason(f.weight_path, cfg) or str(error)
    role = "embedding" if f.cls is QuantEmbed else "dense"
    return skip_reason(f.weight_path, cfg, role=role, out_size=math.prod(axes.out_shape))


def _quantize(f: Found, cfg: QuantConfig, shared: dict[int, QuantParam]) -> None:
    """Quantize one layer; layers that share a variable (by id, all alive by now) still do."""
    key = id(f.weight)
    if key not in shared:
        shared[key] = quantize_weight(f.layer, f.cls, cfg, name=f.weight_path)
    weight = shared[key]
    if f.runs_fused:
        f.cls.convert(f.layer, cfg, weight=weight)
    else:
        setattr(f.layer, f.cls.weight_name, weight)
