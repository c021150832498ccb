"""How a Linen model uses each of its kernels, learned by tracing one call without computing it.

Every parameter goes in as a `Probe`, a box that knows its path and hears from Flax which stacked
axes `nn.scan` and `nn.vmap` take away; an interceptor sees which layer reads it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta

from qjax.nn.linen_box import is_quant_box
from qjax.nn.linen_foreign import registered_kernels, route_of
from qjax.nn.linen_routes import Kernel
from qjax.swap.linen_apply import fused

CONVOLUTION = "convolutions are kept"


@dataclasses.dataclass(frozen=True)
class Use:
    """How a model uses one kernel.

    Attributes:
        contract_axes: of one slice.
        batch_ndim: leading axes: stacked layers first, then the layer's own batch axes.
        role: "dense" or "embedding".
        stack_axes: where the axes of stacked layers are, if not in front.
        problem: why this kernel cannot be quantized, if so.
        is_guess: whether only its shape and name told.
    """

    contract_axes: tuple[int, ...] = ()
    batch_ndim: int = 0
    role: str = "dense"
    stack_axes: tuple[int, ...] = ()
    problem: str | None = None
    is_guess: bool = False


_reads: ContextVar[dict[str, tuple[int, ...]]] = ContextVar("qjax_probe_reads")


def trace_uses(
    module: nn.Module,
    variables: Mapping[str, Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[dict[str, Use], dict[str, tuple[int, ...]]]:
    """Return the use of each kernel that a known layer reads in a call, by path.

    And, of every parameter that is read at all, the stacked axes that scans and vmaps take away.

    Args:
        module: the model.
        variables: with its "params", arrays or `jax.ShapeDtypeStruct`s.
        args: arguments of `module.apply`, arrays or `jax.ShapeDtypeStruct`s.
        kwargs: keyword arguments of `module.apply`, such as `method` and `rngs`.
    """
    uses: dict[str, Use] = {}

    def watch(next_fun, args, kwargs, context):
        module, route = context.module, route_of(context, args)
        probe = _probe_of(module, route.param if route else "kernel")
        if probe is not None and route is not None:
            kernel = route.kernel(module, *args, **kwargs)
            role = "dense" if route.decodes else "embedding"
            uses.setdefault(probe.path, _use(probe, kernel, role))
        elif probe is not None and isinstance(module, (nn.Conv, nn.ConvTranspose, nn.ConvLocal)):
            uses.setdefault(probe.path, Use(problem=CONVOLUTION))
        for name, kernel, role in registered_kernels(module):
            probe = _probe_of(module, name)
            if probe is not None:
                uses[probe.path] = _use(probe, kernel, role)
        return next_fun(*args, **kwargs)

    # Only arrays can be traced; flags, strings and functions stay as they are.
    leaves, treedef = jax.tree.flatten((dict(variables), tuple(args), dict(kwargs)))
    traced = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")}

    def call(traced):
        merged = [traced.get(i, leaf) for i, leaf in enumerate(leaves)]
        variables, args, kwargs = jax.tree.unflatten(treedef, merged)
        probed = {**variables, "params": _probes(variables["params"])}
        with fused(deterministic=True), nn.intercept_methods(watch):
            return module.apply(probed, *args, **kwargs)

    token = _reads.set({})
    try:
        jax.eval_shape(lambda traced: (call(traced), ())[1], traced)
        return uses, _reads.get()
    finally:
        _reads.reset(token)


def path_string(path: Sequence[Any]) -> str:
    """Return a key path as "a/b/kernel"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("value",), meta_fields=("path", "removed")
)
@dataclasses.dataclass(frozen=True, eq=False)
class _Probe(meta.AxisMetadata):
    value: Any
    path: str
    removed: tuple[int, ...] = ()  # stacked axes, outermost first

    def unbox(self):
        _reads.get()[self.path] = self.removed
        return self.value

    def replace_boxed(self, val):
        return dataclasses.replace(self, value=val)

    def add_axis(self, index, params):
        return dataclasses.replace(self, removed=self.removed[:-1])

    def remove_axis(self, index, params):
        return dataclasses.replace(self, removed=(*self.removed, index))


def _probes(params: Any) -> Any:
    def probe(path, leaf):
        if is_quant_box(leaf):
            return leaf
        return _Probe(getattr(leaf, "value", leaf), path_string(path))

    return jax.tree_util.tree_map_with_path(probe, params, is_leaf=meta.is_axis_metadata)


def _probe_of(module: nn.Module, param: str) -> _Probe | None:
    value = module.get_variable("params", param) if module.has_variable("params", param) else None
    return value if isinstance(value, _Probe) else None


def _use(probe: _Probe, kernel: Kernel | None, role: str) -> Use:
    if kernel is None:
        return Use(problem="its layer sums over none of its axes")
    batch_ndim = len(probe.removed) + kernel.batch_ndim
    return Use(kernel.contract_axes, batch_ndim, role, probe.removed)
