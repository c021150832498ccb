"""NNX surgery: the layers of a model to 4 bits.

A layer changes its class in place (see `qjax.nn.nnx_layer`), so every reference to it, shared ones
too, stays good, and its float weight is freed before the next layer is touched.
"""

import math
import warnings
from collections import defaultdict

from flax import nnx

from qjax.core.config import QuantConfig, check_config
from qjax.nn.nnx_layer import quantize_weight, stacked_ndim
from qjax.nn.nnx_param import NOTE, QuantParam
from qjax.swap.nnx_find import Found, layer_class
from qjax.swap.nnx_raw import Raw, find_weights
from qjax.swap.policy import check_patterns, glu_gates, listed, skip_reason

DEFAULT = QuantConfig()
_DECODED = "decoded at each use: its layer has code or a product of its own"


def quantize_model(model: nnx.Module, cfg: QuantConfig = DEFAULT) -> nnx.Module:
    """Quantize the dense layers of an NNX model to 4 bits, in place.

    `nnx.Linear`, `LinearGeneral`, `Einsum` (so `MultiHeadAttention` too), `Conv` of kernel size 1
    and, where an include pattern asks for it, `Embed` become `qjax.nnx` layers under the same
    paths. Shared layers stay shared; layers stacked by `nnx.vmap` are quantized slice by slice. By
    default embeddings, norms, routers and the output head stay in floating point; `qjax.report`
    says what stayed and why. A weight that does not fit its layer stays too, with a warning: layers
    that are stacked along another axis than 0 are such. What is quantized already is left alone,
    whatever `cfg` says of it.

    Under a transform such as `nnx.jit`, make the model there (or `nnx.merge` it) and return it:
    Flax does not carry changes of a layer's class out of a transform that got the model.

    Parameters of other modules too: a module that is one einsum (`einsum_str` and a weight), or
    that `qjax.register` knows, runs on the packed weight. Any other keeps its class and reads its
    weight decoded, with a warning.

    Args:
        model: any module; its arrays may be abstract (`nnx.eval_shape`).
        cfg: which weights and how; patterns are searched in paths such as
            "layers/0/attn/query/kernel".

    Returns:
        The model itself.

    Raises:
        TypeError: not an NNX module; a weight is not floating; cfg is no QuantConfig.
        ValueError: the model has no dense layer, an include pattern matches none of them, or a
            weight, named by path, holds NaN or inf.

    Example:
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.relu)
        >>> model = quantize_model(model)
        >>> model.layers[0].kernel.q.bits_per_param
        4.140625
    """
    check_config(cfg, QuantConfig)
    found = find_weights(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no dense layer to quantize")
    check_patterns(cfg, [f.weight_path for f in found], "weight of a dense layer")
    todo = [f for f in found if not f.is_quantized]
    reasons = _reasons(todo, cfg) | _normalized(model)
    _note_convolutions(model)
    shared: dict[int, QuantParam] = {}
    decoded = []
    for f in todo:
        if reasons[f.weight_path]:
            f.weight.set_metadata(NOTE, reasons[f.weight_path])
            continue
        _quantize(f, cfg.at(f.weight_path), shared)
        if not f.runs_fused:
            decoded.append(f.weight_path)
            f.weight.set_metadata(NOTE, _DECODED)
    if decoded:
        warnings.warn(
            "these layers have code or products of their own, and decode their whole 4-bit weight "
            f"at each call: {listed(decoded)}; see qjax.register",
            stacklevel=2,
        )
    return model


def _reasons(found: list[Found | Raw], cfg: QuantConfig) -> dict[str, str | None]:
    """Return, for each weight's path, why it stays as it is, or None."""
    gates = glu_gates({f.weight_path: tuple(f.weight.shape) for f in found})
    reasons = {f.weight_path: _reason(f, cfg, f.weight_path in gates) for f in found}
    sharing = defaultdict(list)
    for f in found:
        sharing[id(f.weight)].append(f)
    for group in sharing.values():
        kept = [f for f in group if reasons[f.weight_path]]
        uses = {f.use for f in group} if len(group) > 1 else set()
        for f in group:
            other = next((o for o in kept or group if o is not f), None)
            if not reasons[f.weight_path] and other and (kept or len(uses) > 1):
                reasons[f.weight_path] = f"shares its array with {other.weight_path}" + (
                    ", which is kept" if kept else ", which uses it in another way"
                )
    return reasons


def _normalized(model: nnx.Module) -> dict[str, str | None]:
    """Return a reason for each weight that a wrapper of Flax's writes at every call."""
    modules = dict(nnx.iter_modules(model, graph=True))
    wrappers = [m for m in modules.values() if isinstance(m, nnx.WeightNorm | nnx.SpectralNorm)]
    inside = {id(wrapper.layer_instance) for wrapper in wrappers}
    return {
        "/".join(map(str, (*path, name))): "its weight is normalized at each call"
        for path, module in modules.items()
        if id(module) in inside
        for name in vars(module)
    }


def _note_convolutions(model: nnx.Module) -> None:
    for _, module in nnx.iter_modules(model, graph=True):
        if isinstance(module, nnx.Conv | nnx.ConvTranspose) and layer_class(module) is None:
            module.kernel.set_metadata(NOTE, "convolutions are kept")


def _reason(f: Found | Raw, cfg: QuantConfig, is_glu: bool) -> str | None:
    try:
        axes = f.axes()
        stacked_ndim(tuple(f.weight.shape), axes, f.weight_path)
    except (ValueError, AttributeError) as error:  # a subclass may lack Flax's attributes
        reason = skip_reason(f.weight_path, cfg)
        if reason is None:
            warnings.warn(f"left in floating point: {error}", stacklevel=4)
        return reason or str(error)
    out_size = math.inf if is_glu else math.prod(axes.out_shape)
    return skip_reason(f.weight_path, cfg, role=f.role, out_size=out_size)


def _quantize(f: Found | Raw, cfg: QuantConfig, shared: dict[int, QuantParam]) -> None:
    """Quantize one weight; layers that share a variable (by id, all alive by now) still do."""
    key = id(f.weight)
    if key not in shared:
        shared[key] = quantize_weight(f.weight, f.axes(), cfg, name=f.weight_path)
    f.put(shared[key], cfg)
