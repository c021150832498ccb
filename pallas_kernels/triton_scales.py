"""Block scales inside a Pallas-Triton kernel: read, or decoded from their double quantization."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels.scales import SECOND_LEVEL_BLOCK, DoubleQuantScales


class ScaleSpec(NamedTuple):
    """What a kernel knows of the scales while it is traced.

    Attributes:
        blocks: scales in a row.
        pitch: with double quantization, scales in a row of the whole weight; otherwise None.
        shifted: a shard that does not start at the weight's first scale.
        interpret: the kernel runs as jnp, where assembly cannot.
    """

    blocks: int
    pitch: int | None
    shifted: bool
    interpret: bool

    def load(self, refs, layer, block: jax.Array, inside: jax.Array) -> jax.Array:
        """The float32 scale of each flat block, 0 outside; `refs` are those of `operands`."""
        if self.pitch is None:
            return plt.load(refs[0].at[layer, block], mask=inside, other=0.0)
        codes_ref, absmax_ref, offset_ref, table_ref, origin_ref = refs
        code = plt.load(codes_ref.at[layer, block], mask=inside, other=0).astype(jnp.int32)
        place = block
        if self.shifted or self.pitch != self.blocks:
            row = block // self.blocks
            place = (row + origin_ref[0]) * self.pitch + (block - row * self.blocks) + origin_ref[1]
        group = place // SECOND_LEVEL_BLOCK
        absmax = plt.load(absmax_ref.at[layer, group], mask=inside, other=0.0)
        scale = (
            _product(plt.load(table_ref.at[code]), absmax, self.interpret) + offset_ref[layer, 0]
        )
        return jnp.where(inside, scale, 0.0)


def operands(
    scales: jax.Array | DoubleQuantScales, blocks: int, layered: bool, interpret: bool
) -> tuple[ScaleSpec, list[jax.Array]]:
    """Split scales into what is static and the arrays, one row for each layer."""

    def rows(a):
        return a.reshape(a.shape[0] if layered else 1, -1)

    if not isinstance(scales, DoubleQuantScales):
        return ScaleSpec(blocks, None, False, interpret), [rows(scales)]
    shifted = scales.origin is not None
    spec = ScaleSpec(blocks, scales.pitch or blocks, shifted, interpret)
    origin = scales.origin.astype(jnp.int32) if shifted else jnp.zeros(2, jnp.int32)
    arrays = [rows(scales.codes), rows(scales.absmax), rows(scales.offset), scales.table, origin]
    return spec, arrays


def layer_index(layer: jax.Array | int | None) -> jax.Array:
    """The layer as the int32 [1] operand of a kernel."""
    return jnp.reshape(jnp.asarray(0 if layer is None else layer, jnp.int32), (1,))


def _product(a, b, interpret):
    """Return a * b, rounded by itself: the compiler would fuse the addition that follows."""
    if interpret:
        return jax.lax.optimization_barrier(a * b)
    [product] = plt.elementwise_inline_asm(
        "mul.rn.f32 $0, $1, $2;",
        args=[a, b],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, a.dtype)],
    )
    return product
