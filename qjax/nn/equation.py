"""What an equation "x,w->out" says of the axes of w."""

from typing import NamedTuple


class WeightAxes(NamedTuple):
    """How one layer, not stacked, uses its weight."""

    shape: tuple[int, ...]
    batch_ndim: int  # leading axes of `shape` that the products run over
    contract_axes: tuple[int, ...]  # that a product sums over, counted behind the batch axes

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Sizes of the axes of a slice that are not summed over."""
        slice_shape = self.shape[self.batch_ndim :]
        return tuple(n for i, n in enumerate(slice_shape) if i not in self.contract_axes)

    @property
    def contract_shape(self) -> tuple[int, ...]:
        """Sizes of the axes that are."""
        return tuple(self.shape[self.batch_ndim + i] for i in self.contract_axes)


def terms(equation: str) -> tuple[str, str, str]:
    """Split "x,w->out".

    Raises:
        ValueError: it has not this form, or w has an ellipsis.
    """
    parts = equation.replace(" ", "").replace("->", ",").split(",")
    if len(parts) != 3 or "->" not in equation or "." in parts[1]:
        raise ValueError(f"equation={equation!r} must be 'x,w->out'")
    return parts[0], parts[1], parts[2]


def equation_axes(equation: str, shape: tuple[int, ...]) -> WeightAxes:
    """Return how an equation uses a weight of this shape.

    Axes in front that x and the result share are batch axes; those that the result lacks are summed
    over.

    Raises:
        ValueError: it does not fit the shape, or sums over no axis of the weight.
    """
    x, kernel, out = terms(equation)
    if len(kernel) != len(shape):
        raise ValueError(f"equation={equation!r} does not fit a weight of shape {shape}")
    batch = 0
    while batch < len(kernel) and kernel[batch] in x and kernel[batch] in out:
        batch += 1
    contract = [i for i, axis in enumerate(kernel[batch:]) if axis in x and axis not in out]
    if not contract:
        raise ValueError(f"equation={equation!r} sums over no axis of the kernel")
    return WeightAxes(tuple(shape), batch, tuple(contract))
