"""Kernels of layers that `nn.scan` or `nn.vmap` stacks along other axes than 0.

A QTensor has its stacked axes in front. `stack_axes` says where the float kernel has them: for each
scan, outermost first, the axis that it takes away.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array


def to_front(w: Array, stack_axes: Sequence[int]) -> Array:
    """Return a stacked kernel with its stacked axes in front."""
    for i, axis in enumerate(stack_axes):
        w = jnp.moveaxis(w, i + axis, i)
    return w


def from_front(w: Array, stack_axes: Sequence[int]) -> Array:
    """Undo `to_front`."""
    for i, axis in reversed(list(enumerate(stack_axes))):
        w = jnp.moveaxis(w, i, i + axis)
    return w


def items_to_front(items: Sequence[Any], stack_axes: Sequence[int]) -> tuple[Any, ...]:
    """Return one item for each axis of a kernel, such as its size, in the order of `to_front`."""
    result = list(items)
    for i, axis in enumerate(stack_axes):
        result.insert(i, result.pop(i + axis))
    return tuple(result)


def items_from_front(items: Sequence[Any], stack_axes: Sequence[int]) -> tuple[Any, ...]:
    """Undo `items_to_front`."""
    result = list(items)
    for i, axis in reversed(list(enumerate(stack_axes))):
        result.insert(i + axis, result.pop(i))
    return tuple(result)
