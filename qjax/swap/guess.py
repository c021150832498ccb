"""What the name and shape of a parameter tell, where nothing else is known of it.

A wrong guess costs speed, and an adapter of another shape; never the result.
"""

import re
from collections.abc import Sequence

from qjax.nn.equation import WeightAxes

_SMALLEST = 32  # both of a matrix's sizes; smaller ones are biases by head, filters, states
_TABLE = re.compile(r"(embed|table|vocab)", re.IGNORECASE)
_VECTOR = re.compile(r"(^|_)(bias|scale|gamma|beta|pos\w*|cls|token|a_log)(_|$)", re.IGNORECASE)
_EXPERTS = re.compile(r"(expert|moe|mixture|mlp|ffn|ffw|feed_?forward|gating)", re.IGNORECASE)


def role_of(name: str) -> str:
    """Return "embedding" for the name of a table, else "dense"."""
    return "embedding" if _TABLE.search(name) else "dense"


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Return whether a parameter, not stacked, is a weight: by its name, and two sizes of 32."""
    sizes = sorted(shape)[-2:]
    return len(sizes) == 2 and sizes[0] >= _SMALLEST and not _VECTOR.search(name)


def guess_axes(path: str, shape: Sequence[int], role: str) -> WeightAxes:
    """Guess how a parameter, not stacked, is used.

    A matrix is [in, out]; a table is [V, D]. Of experts [E, in, out] each is a matrix. Of other
    arrays, such as [in, heads, dim] or [heads, dim, out], the largest axis is taken against all
    others: one of the two sides of the product that they are for.
    """
    shape = tuple(shape)
    if len(shape) == 2:
        return WeightAxes(shape, 0, (1,) if role == "embedding" else (0,))
    batch = 1 if _EXPERTS.search(path) else 0
    if len(shape) == 3 and batch:
        return WeightAxes(shape, 1, (0,))
    rest = shape[batch:]
    return WeightAxes(shape, batch, (rest.index(max(rest)),))
