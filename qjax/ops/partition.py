"""The matmul under `jit` on a mesh: each device multiplies its shard of the packed weight.

Without a rule XLA gathers whatever feeds a kernel. The rule here relates the axes of the operands
(`b` counts blocks, so a shard never splits one):

    x [m, b i] times packed [n, b j], scales [n, b] gives [m, n], summed over b;
    transposed, x [m, n] gives [m, b i], summed over n;
    of experts each array has an axis e in front.

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
from qjax.core.placement import axis_names, padded


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
        sharded = zip((self.rows, self.blocks), scales.shape[-2:], strict=True)
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
    and table. Under vmap more rows of x join those there are, and a stack of weights, such as
    experts, has a rule of its own.
    """
    local = local_product(block_size, transpose, implementation)

    def partitioned(operands, stacked):
        one_block = operands[2].shape[-1] == 1
        made = _partitioned(local, block_size, transpose, len(operands) - 4, one_block, stacked)
        return made(*operands)

    @jax.custom_batching.custom_vmap
    def call(*operands):
        # One device needs no rule. (The count of devices is fixed once JAX runs.)
        return local(*operands) if jax.device_count() == 1 else partitioned(operands, False)

    @call.def_vmap
    def batched(axis_size, is_batched, x, *weight):
        x_batched, *weight_batched = is_batched
        if x_batched and not any(weight_batched):
            y = call(x.reshape(-1, x.shape[-1]), *weight)
            return y.reshape(*x.shape[:-1], y.shape[-1]), True
        operands = x, *weight
        if jax.device_count() > 1 and weight_batched == list(_in_stack(len(operands))[1:]):
            x = x if x_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            return stack(x, *weight), True
        return jax.vmap(local, in_axes=_axes(is_batched))(*operands), True

    @jax.custom_batching.custom_vmap
    def stack(*operands):
        return partitioned(operands, True)

    @stack.def_vmap
    def stacks(axis_size, is_batched, *operands):
        """Stacks of stacks are left to the compiler to partition."""
        one = jax.vmap(local, in_axes=_axes(_in_stack(len(operands))))
        return jax.vmap(one, in_axes=_axes(is_batched))(*operands), True

    return call


def _in_stack(count: int) -> tuple[bool, ...]:
    """Which operands of a stack of products are stacked: all but the tables."""
    return (True, True, True, False, True, True, False)[:count]


def _axes(is_batched) -> list[int | None]:
    return [0 if batched else None for batched in is_batched]


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
def _partitioned(local, block_size: int, transpose: bool, second_count: int, one_block, stacked):
    def partition(mesh, arg_shapes, result_shape):
        *x_stack, batch, _ = _spec(arg_shapes[0])
        *stack, rows, blocks = _spec(arg_shapes[2])
        # Experts are where their weights are. Tokens that the same axis shards go to them.
        sent = batch if stacked and batch and batch == stack[0] and not x_stack[0] else None
        stack = [own or other for own, other in zip(stack, x_stack, strict=True)]
        batch, rows, blocks = (without(entry, *stack) for entry in (batch, rows, blocks))
        # An axis of the mesh can shard one operand only. What it gathers is the smaller one: x
        # in decoding, in training the weight (FSDP), which goes over the wire packed.
        if nbytes(arg_shapes[0]) < sum(nbytes(a) for a in arg_shapes[1:3]):
            batch = without(batch, rows, blocks)
        else:
            rows, blocks = without(rows, batch), without(blocks, batch)
        summed, kept = (rows, blocks) if transpose else (blocks, rows)
        weight = [PartitionSpec(*stack, rows, blocks)] * 2
        second = [PartitionSpec(*stack), PartitionSpec(*stack), PartitionSpec()][:second_count]
        x_spec = PartitionSpec(None, sent, summed) if sent else PartitionSpec(*stack, batch, summed)
        specs = [x_spec, *weight, PartitionSpec(), *second]
        shard = Shard(mesh, rows, blocks, transpose, arg_shapes[2].shape[-1])

        def run(x, *weight):
            if sent:
                x = jax.lax.all_to_all(x, axis_names(sent), 0, 1, tiled=True)
            how = {"origin": shard.origin(weight[1]), "pitch": shard.pitch}
            one = functools.partial(local, **how)
            if stacked:
                one = jax.vmap(one, in_axes=_axes(_in_stack(1 + len(weight))))
            return shard.add_up(one(x, *weight))

        shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
        result = NamedSharding(mesh, PartitionSpec(*stack, batch, kept))
        return mesh, run, result, shardings

    # Rows of one block have no axis of blocks: a rule may not have a factor of 1.
    of_blocks: dict[str, Any] = {} if one_block else {"i": block_size, "j": block_size // 2}
    stack = ("e",) if stacked else ()
    wide: tuple = (*stack, "m", "i" if one_block else ("b", "i"))
    narrow: tuple = (*stack, "m", "n")
    x, y = (narrow, wide) if transpose else (wide, narrow)
    second = [(*stack, "groups"), stack, ("entries",)][:second_count]
    packed = (*stack, "n", "j" if one_block else ("b", "j"))
    operands: tuple = (x, packed, (*stack, "n", "b"), ("codes",), *second)
    results: tuple = (y,)
    unpartitioned = jax.vmap(local, in_axes=_axes(_in_stack(len(operands)))) if stacked else local
    wrapped = custom_partitioning(lambda *operands: unpartitioned(*operands))
    wrapped.def_partition(
        partition=partition,
        sharding_rule=SdyShardingRule(operands, results, **of_blocks),
    )
    return wrapped


def _spec(array) -> tuple:
    return padded(array.sharding.spec, len(array.shape))


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
