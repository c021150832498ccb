"""How a Linen model uses each of its kernels, told from names and shapes alone.

A kernel [*stacked, *contract, *features] does not say where its parts begin. What tells:

- an `embedding` is [*stacked, V, D], and a kernel of rank 2 is [in, out];
- the bias beside a kernel is [*stacked, *features];
- a scope named `Scan...` or `Vmap...`, as Flax names lifted modules, stacks one axis, and the
  `scale` of a norm in the same block is a vector, so that its further axes are stacked ones;
- `query`, `key` and `value` of Flax's attention are [in, heads, dim], `out` is [heads, dim, out];
- a name with `out`, `o` or `proj` tells a projection [heads, dim, out] from a convolution.

A kernel for which this leaves several readings is not quantized unless the caller says more.
"""

import re
from collections import defaultdict
from collections.abc import Mapping

from qjax.nn.stack_axes import items_to_front
from qjax.swap.guess import guess_axes, is_matrix, role_of
from qjax.swap.linen_trace import CONVOLUTION, Use

# Name -> number of feature axes of the rank-3 kernels of nn.MultiHeadDotProductAttention.
_ATTENTION = {"query": 2, "key": 2, "value": 2, "out": 1}
_OUTPUT = re.compile(r"(^|_)(o|wo|out|output|proj)(_|\d|$)")
_CONV = re.compile("conv", re.IGNORECASE)


def guess_uses(
    shapes: Mapping[str, tuple[int, ...]], stacked: Mapping[str, int] | None = None
) -> dict[str, Use]:
    """Return the use of each leaf named `kernel` or `embedding`, and of raw ones, by path.

    Args:
        shapes: of all leaves, by path.
        stacked: number of stacked axes of some kernels, where the caller knows it.
    """
    split = {tuple(path.split("/")): path for path in shapes}
    norms: dict[tuple[str, ...], list[tuple[int, ...]]] = defaultdict(list)
    for names, path in split.items():
        if names[-1] == "scale":
            for depth in range(len(names)):
                norms[names[:depth]].append(shapes[path])
    uses = {}
    for names, path in split.items():
        if names[-1] in ("kernel", "embedding"):
            bias = shapes.get("/".join((*names[:-1], "bias")))
            uses[path] = _guess(names, shapes[path], bias, (stacked or {}).get(path), norms)
            continue
        batch_ndim = (stacked or {}).get(path, _stacked_axes(names, shapes[path], norms) or 0)
        use = guess_raw(path, shapes[path], (0,) * batch_ndim)
        if use is not None:
            uses[path] = use
    return uses


def guess_raw(path: str, shape: tuple[int, ...], stack_axes: tuple[int, ...]) -> Use | None:
    """Return the use of a parameter with a name of its own, or None if it is no weight.

    Args:
        path: of the parameter.
        shape: with its stacked axes.
        stack_axes: which these are, as scans and vmaps take them away, outermost first.
    """
    name, batch_ndim = path.rpartition("/")[2], len(stack_axes)
    shape = items_to_front(shape, stack_axes)
    if not is_matrix(name, shape[batch_ndim:]):
        return None
    role = role_of(name)
    axes = guess_axes(path, shape[batch_ndim:], role)
    return Use(axes.contract_axes, batch_ndim + axes.batch_ndim, role, stack_axes, is_guess=True)


def _guess(path: tuple[str, ...], shape, bias, stacked: int | None, norms) -> Use:
    rank = len(shape)
    if path[-1] == "embedding":
        batch_ndim = rank - 2 if stacked is None else stacked
        if rank - batch_ndim != 2:
            return Use(role="embedding", problem=f"a table must be [V, D], got {list(shape)}")
        return Use((1,), batch_ndim, "embedding")
    layer = path[-2] if len(path) > 1 else ""
    if _CONV.search(layer):
        return Use(problem=CONVOLUTION)
    readings = _readings(shape, bias, stacked)
    if stacked is None:
        evidence = _stacked_axes(path, shape, norms)
        readings = [r for r in readings if evidence in (None, r[0])] or readings
    if len(readings) > 1 and layer in _ATTENTION:
        attention = (rank - 3, _ATTENTION[layer])
        readings = [r for r in readings if r == attention] or readings
    if rank > 3 and readings == [(0, 1)]:
        return Use(problem=CONVOLUTION)  # [height, width, in, out]
    if len(readings) != 1 or not _like_its_name(layer, rank, *readings[0]):
        return Use(
            problem=f"its shape {list(shape)} does not tell which axes are contracted or stacked; "
            "pass module= and example_args=, or contract_axes= and batch_ndim="
        )
    ((batch_ndim, features),) = readings
    return Use(tuple(range(rank - batch_ndim - features)), batch_ndim)


def _like_its_name(layer: str, rank: int, batch_ndim: int, features: int) -> bool:
    """Return False for [a, b, out] unless the name speaks of an output: it may be a convolution."""
    return rank - batch_ndim - features < 2 or bool(_OUTPUT.search(layer))


def _readings(shape, bias, stacked: int | None) -> list[tuple[int, int]]:
    """Return the pairs (stacked axes, feature axes) that leave an axis to contract."""
    rank = len(shape)
    pairs = [
        (batch, features)
        for batch in (range(rank - 1) if stacked is None else (stacked,))
        for features in range(1, rank - batch)
    ]
    if bias is None:
        return pairs
    return [
        (batch, features)
        for batch, features in pairs
        if tuple(bias) == tuple(shape[:batch]) + tuple(shape[rank - features :])
    ]


def _stacked_axes(path: tuple[str, ...], shape, norms) -> int | None:
    lifted = sum(name.startswith(("Scan", "Vmap")) for name in path)
    if lifted:
        return lifted
    for depth in range(len(path) - 1, -1, -1):
        scales = norms.get(path[:depth])
        if scales:
            axes = {len(scale) - 1 for scale in scales}
            same = all(scale[:-1] == tuple(shape[: len(scale) - 1]) for scale in scales)
            return axes.pop() if len(axes) == 1 and same else None
    return None
