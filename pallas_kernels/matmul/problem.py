"""The static description of one matmul, and its flat operands, as the Mosaic kernels take them."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.scales import DoubleQuantScales


class Operands(NamedTuple):
    """The arrays of a call.

    Attributes:
        scales: (scales,) or (codes, absmax, offset, table, origin).
        adapter: (hidden, b) of an adapter, or ().
        residual: (what is added to the result,), or ().
    """

    x: jax.Array
    packed: jax.Array
    scales: tuple[jax.Array, ...]
    codebook: jax.Array
    layer: jax.Array
    adapter: tuple[jax.Array, ...] = ()
    residual: tuple[jax.Array, ...] = ()


OPERANDS = len(Operands._fields)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a kernel is specialized for: y[M, N] = x[M, K] @ dequantize(W[N, K]).T.

    Attributes:
        stacked: the weight is one slice of a [layers, ...] stack, chosen by the `layer` operand.
        double: the scales are double-quantized.
        pitch: with `double`, scales in a row of the whole weight.
        groups: with `double`, second-level values of one slice.
        stacked_table: with `double`, each slice has its own 8-bit table.
        part: with `double`, the weight is a part of a larger one, and `origin` is not 0.
        rank: of an adapter, hidden[M, sections * rank] @ B[N, rank].T, that is added; 0 for none.
        sections: rows of W that share a part of `hidden`, in order.
        residual: whether an array [M, N] is added.
    """

    m: int
    n: int
    k: int
    block_size: int
    dtype: str
    stacked: bool = False
    double: bool = False
    pitch: int = 0
    groups: int = 0
    stacked_table: bool = False
    part: bool = False
    rank: int = 0
    sections: tuple[int, ...] = ()
    residual: bool = False

    @property
    def blocks(self) -> int:
        """Scales in a row."""
        return self.k // self.block_size


def describe(
    x: jax.Array,
    packed: jax.Array,
    scales: jax.Array | DoubleQuantScales,
    codebook: jax.Array,
    block_size: int,
    layer: jax.Array | None,
) -> tuple[Problem, Operands]:
    """Split a call into its static part and its arrays; shapes as in `mosaic_gpu.matmul`."""
    (m, k), n = x.shape, packed.shape[-2]
    stacked = layer is not None
    layer = jnp.zeros(1, jnp.int32) if layer is None else jnp.asarray(layer, jnp.int32).reshape(1)
    problem = Problem(m, n, k, block_size, jnp.dtype(x.dtype).name, stacked)
    if not isinstance(scales, DoubleQuantScales):
        return problem, Operands(x, packed, (scales,), codebook, layer)
    origin = jnp.zeros(2, jnp.int32) if scales.origin is None else scales.origin
    problem = dataclasses.replace(
        problem,
        double=True,
        pitch=scales.pitch or k // block_size,
        groups=scales.absmax.shape[-1],
        stacked_table=scales.table.ndim == 2,
        part=scales.origin is not None,
    )
    arrays = (scales.codes, scales.absmax, scales.offset.reshape(-1), scales.table, origin)
    return problem, Operands(x, packed, arrays, codebook, layer)
