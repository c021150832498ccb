"""What quantize_params does with each leaf of a Linen tree, and why."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from qjax.core.config import QuantConfig
from qjax.nn.linen_box import is_quant_box
from qjax.nn.stack_axes import items_to_front
from qjax.swap.linen_guess import guess_raw, guess_uses
from qjax.swap.linen_trace import CONVOLUTION, Use, path_string, trace_uses
from qjax.swap.policy import check_patterns, glu_gates, listed, matches, skip_reason


def plan_params(
    variables: Mapping[str, Any],
    cfg: QuantConfig,
    *,
    module: nn.Module | None = None,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    contract_axes: Mapping[str, tuple[int, ...]] | None = None,
    batch_ndim: int | Mapping[str, int] | None = None,
) -> dict[str, Use | str]:
    """Return, for each path in "params", how its kernel is used, or why it stays as it is.

    The arguments are those of `quantize_params`, as are the errors.
    """
    leaves = leaves_by_path(variables["params"])
    stacked = _by_pattern("batch_ndim", batch_ndim, leaves)
    uses = guess_uses({path: _shape(leaf) for path, leaf in leaves.items()}, stacked)
    if module is not None:  # what no known layer reads in this call stays a guess
        traced, reads = trace_uses(module, variables, example_args, example_kwargs or {})
        for path, removed in reads.items():  # of a module that is not known, but its stack is
            if path not in uses or uses[path].is_guess or _ambiguous(uses[path]):
                raw = guess_raw(path, _shape(leaves[path]), removed)
                uses |= {path: raw} if raw else {}
        uses |= traced
    elif example_args or example_kwargs:
        raise ValueError("example_args and example_kwargs need module=")
    for path, axes in _by_pattern("contract_axes", contract_axes, leaves).items():
        role = uses[path].role if path in uses else "dense"
        uses[path] = Use(tuple(axes), stacked.get(path, 0), role)
    if not uses:
        raise ValueError("params hold no kernel or embedding; contract_axes= names other weights")
    _check_include(cfg, uses)
    gates = glu_gates({path: _shape(leaf) for path, leaf in leaves.items()})
    plan = {
        path: _decide(path, leaf, uses.get(path), cfg, path in gates)
        for path, leaf in leaves.items()
    }
    unread = [
        f"{path}: {why}" for path, why in plan.items() if path in uses and _unread(uses[path], why)
    ]
    raw = [path for path, use in plan.items() if isinstance(use, Use) and use.is_guess]
    if raw:
        warnings.warn(
            "these parameters are no kernels of known layers; their axes are a guess, and a module "
            f"that is not known decodes the whole weight at each use: {listed(raw)}; see "
            "qjax.register"
            + ("" if module is not None else ", and pass module= and example_args="),
            stacklevel=3,
        )
    if unread:
        more = f"; and {len(unread) - 4} more" if len(unread) > 4 else ""
        warnings.warn(f"left in floating point: {'; '.join(unread[:4])}{more}", stacklevel=3)
    return plan


def leaves_by_path(params: Any) -> dict[str, Any]:
    """Return arrays and boxes of a tree by path, such as "layers/attn/query/kernel"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=meta.is_axis_metadata)
    return {path_string(path): leaf for path, leaf in leaves}


def _decide(path: str, leaf: Any, use: Use | None, cfg: QuantConfig, is_glu: bool) -> Use | str:
    if is_quant_box(leaf):
        return "it is in 4 bits already"
    if use is None:
        return "not a kernel"
    slice_shape = items_to_front(_shape(leaf), use.stack_axes)[use.batch_ndim :]
    out = [size for i, size in enumerate(slice_shape) if i not in use.contract_axes]
    out_size = math.inf if is_glu else math.prod(out)
    reason = skip_reason(path, cfg, role=use.role, out_size=out_size)
    return reason or use.problem or use


def _unread(use: Use, decision: Use | str) -> bool:
    return decision is use.problem and _ambiguous(use)


def _ambiguous(use: Use) -> bool:
    return use.problem not in (None, CONVOLUTION)


def _check_include(cfg: QuantConfig, uses: Mapping[str, Use]) -> None:
    check_patterns(cfg, uses, "kernel or embedding")
    for pattern in cfg.include or ():
        found = [path for path in uses if matches(path, [pattern])]
        if all(uses[path].problem for path in found):
            reasons = "; ".join(f"{path}: {uses[path].problem}" for path in found[:4])
            raise ValueError(
                f"include={pattern!r} matches only what cannot be quantized: {reasons}"
            )


def _by_pattern(name: str, value: Any, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Spell out a mapping from patterns, or one value for all, by path; the first match wins."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return dict.fromkeys(leaves, value)
    result: dict[str, Any] = {}
    for pattern, item in value.items():
        found = [path for path in leaves if matches(path, [pattern])]
        if not found:
            raise ValueError(f"{name}: {pattern!r} matches no parameter")
        result = dict.fromkeys(found, item) | result
    return result


def _shape(leaf: Any) -> tuple[int, ...]:
    return leaf.q.shape if is_quant_box(leaf) else tuple(jnp.shape(getattr(leaf, "value", leaf)))
