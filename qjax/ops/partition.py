"""The matmul under `jit` on a mesh: each device multiplies its shard of the packed weight.

Without a rule XLA gathers whatever feeds a kernel. The rule here relates the axes of the operands
(`b` counts blocks, so a shard never splits one):

    x [m, b i] times packed [n, b j], scales [n, b] gives [m, n], summed over b;
    transposed, x [m, n] gives [m, b i], summed over n.

If the summed axis is sharded each device adds up its part, and one all-reduce makes the sum. Of
doubly quantized scales the codes are sharded and the second level is replicated; a shard tells
the kernel at which scale of the whole weight it starts.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import SdyShardingRule, custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

import pallas_kernels
from pallas_kernels import DoubleQuantScales
from qjax.core.placement import axis_names


class Shard(NamedTuple):
    """Which part of the weight a device multiplies.

    Attributes:
        mesh: concrete or abstract.
        rows: mesh axes that the weight's rows are sharded over, as an entry of a PartitionSpec.
        blocks: those of its blocks.
        transpose: whether the rows are summed over, and not the blocks.
        pitch: blocks in a row of the whole weight.
    """

    mesh: Any
    rows: Any
    blocks: Any
    transpose: bool
    pitch: int

    def origin(self, scales: jax.Array) -> jax.Array:
        """Return the row and the block of the whole weight at which this device's part starts."""
        sharded = zip((self.rows, self.blocks), scales.shape, strict=True)
        return jnp.stack([_position(axis, self.mesh) * size for axis, size in sharded])

    def add_up(self, y: jax.Array) -> jax.Array:
        """Return the sum of what the devices have, where the summed axis is sharded."""
        summed = axis_names(self.rows if self.transpose else self.blocks)
        if not summed:
            return y
        return jax.lax.psum(y, summed)


@functools.cache
def product(block_size: int, transpose: bool, implementation: str | None):
    """Return f(x, packed, scales, codebook, *second) -> y: one rows-layout slice, partitioned.

    `scales` is float32, or the codes of double quantization; then `second` is its absmax, offset
    and table. Under vmap more rows of x join those there are; a batch of weights is multiplied
    without the rule, and left to the compiler to partition.
    """
    local = local_product(block_size, transpose, implementation)

    @jax.custom_batching.custom_vmap
    def call(*operands):
        # One device needs no rule. (The count of devices is fixed once JAX runs.)
        if jax.device_count() == 1:
            return local(*operands)
        one_block = operands[2].shape[1] == 1
        return _partitioned(local, block_size, transpose, len(operands) - 4, one_block)(*operands)

    @call.def_vmap
    def batched(axis_size, is_batched, x, *weight):
        x_batched, *weight_batched = is_batched
        if x_batched and not any(weight_batched):
            y = call(x.reshape(-1, x.shape[-1]), *weight)
            return y.reshape(*x.shape[:-1], y.shape[-1]), True
        axes = [0 if b else None for b in is_batched]
        return jax.vmap(local, in_axes=axes)(x, *weight), True

    return call


@functools.cache
def local_product(block_size: int, transpose: bool, implementation: str | None):
    """Return the product of one device, of the same arguments and `origin` and `pitch`."""
    how = {"block_size": block_size, "transpose": transpose, "implementation": implementation}
    return functools.partial(_local, **how)


def _local(x, packed, scales, codebook, *second, origin=None, pitch=None, **how):
    if second:
        scales = DoubleQuantScales(scales, *second, origin=origin, pitch=pitch)
    return pallas_kernels.matmul(x, packed, scales, codebook, **how)


@functools.cache
def _partitioned(local, block_size: int, transpose: bool, second_count: int, one_block: bool):
    def partition(mesh, arg_shapes, result_shape):
        batch = _spec(arg_shapes[0])[0]
        rows, blocks = _spec(arg_shapes[2])
        # An axis of the mesh can shard one operand only. What it gathers is the smaller one: x
        # in decoding, in training the weight (FSDP), which goes over the wire packed.
        if nbytes(arg_shapes[0]) < sum(nbytes(a) for a in arg_shapes[1:3]):
            batch = without(batch, rows, blocks)
        else:
            rows, blocks = without(rows, batch), without(blocks, batch)
        summed, kept = (rows, blocks) if transpose else (blocks, rows)
        weight = [PartitionSpec(rows, blocks)] * 2
        specs = [PartitionSpec(batch, summed), *weight, *[PartitionSpec()] * (second_count + 1)]
        shard = Shard(mesh, rows, blocks, transpose, arg_shapes[2].shape[1])

        def run(x, packed, scales, *rest):
            origin = shard.origin(scales)
            return shard.add_up(local(x, packed, scales, *rest, origin=origin, pitch=shard.pitch))

        shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
        return mesh, run, NamedSharding(mesh, PartitionSpec(batch, kept)), shardings

    # Rows of one block have no axis of blocks: a rule may not have a factor of 1.
    of_blocks: dict[str, Any] = {} if one_block else {"i": block_size, "j": block_size // 2}
    wide: tuple = ("m", "i" if one_block else ("b", "i"))
    narrow: tuple = ("m", "n")
    x, y = (narrow, wide) if transpose else (wide, narrow)
    second = [("groups",), (), ("entries",)][:second_count]
    packed = ("n", "j" if one_block else ("b", "j"))
    operands: tuple = (x, packed, ("n", "b"), ("codes",), *second)
    results: tuple = (y,)
    wrapped = custom_partitioning(lambda *operands: local(*operands))
    wrapped.def_partition(
        partition=partition,
        sharding_rule=SdyShardingRule(operands, results, **of_blocks),
    )
    return wrapped


def _spec(matrix) -> tuple:
    return (*matrix.sharding.spec, None, None)[:2]


def without(entry, *others) -> tuple[str, ...] | None:
    """Return an entry of a PartitionSpec less the mesh axes that others name."""
    taken = [name for other in others for name in axis_names(other)]
    return tuple(name for name in axis_names(entry) if name not in taken) or None


def nbytes(a) -> int:
    """Return the bytes of an array, abstract or not."""
    return math.prod(a.shape) * a.dtype.itemsize


def _position(axis, mesh) -> jax.Array:
    """Return which shard of a dimension this device has: the major mesh axis counts most."""
    index = jnp.int32(0)
    for name in axis_names(axis):
        index = index * mesh.shape[name] + jax.lax.axis_index(name).astype(jnp.int32)
    return index
