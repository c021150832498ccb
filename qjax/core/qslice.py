"""QSlice and ArraySlice: one slice of a stack of weights or arrays, not yet taken.

`jax.lax.scan` over stacked layers would copy each layer's bytes out of the stack. A product with a
slice reads them where they are.
"""

import dataclasses
from typing import Any

import jax

from qjax.core.qtensor import QTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QSlice:
    """`stack[index]` along the first batch axis.

    Attributes:
        stack: a `QTensor` with a batch axis at least.
        index: int32 scalar, may be traced.
    """

    stack: QTensor
    index: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape of the slice."""
        return self.stack.shape[1:]

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Logical dtype."""
        return self.stack.dtype

    def take(self) -> QTensor:
        """Return the slice as a `QTensor`: a copy of its bytes."""
        return jax.tree.map(lambda leaf: leaf[self.index], self.stack)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """Decode the slice: see `QTensor.dequantize`."""
        return self.take().dequantize(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ArraySlice:
    """`stack[index]` along the first axis; indexing it, with `...` too, gives the array.

    Attributes:
        stack: an array.
        index: int32 scalar, may be traced.
    """

    stack: jax.Array
    index: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the slice."""
        return self.stack.shape[1:]

    @property
    def dtype(self) -> Any:
        """Dtype of its elements."""
        return self.stack.dtype

    def __getitem__(self, index: Any) -> jax.Array:
        taken = jax.lax.dynamic_index_in_dim(self.stack, self.index, keepdims=False)
        return taken if index is ... else taken[index]


def taken(q: QTensor | QSlice) -> QTensor:
    """Return a `QTensor` in any case."""
    return q.take() if isinstance(q, QSlice) else q
