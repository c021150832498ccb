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
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import SdyShardingRule, custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

import pallas_kernels
from pallas_kernels import DoubleQuantScales


@functools.cache
def product(block_size: int, transpose: bool, implementation: str | None):
    """Return f(x, packed, scales, codebook, *second) -> y: one rows-layout slice, partitioned.

    `scales` is float32, or the codes of double quantization; then `second` is its absmax, offset
    and table. Under vmap more rows of x join those there are; a batch of weights is multiplied
    without the rule, and left to the compiler to partition.
    """
    local = functools.partial(
        _local, block_size=block_size, transpose=transpose, implementation=implementation
    )

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
        if _bytes(arg_shapes[0]) < sum(_bytes(a) for a in arg_shapes[1:3]):
            batch = _without(batch, rows, blocks)
        else:
            rows, blocks = _without(rows, batch), _without(blocks, batch)
        summed, kept = (rows, blocks) if transpose else (blocks, rows)
        weight = [PartitionSpec(rows, blocks)] * 2
        specs = [PartitionSpec(batch, summed), *weight, *[PartitionSpec()] * (second_count + 1)]
        pitch = arg_shapes[2].shape[1]

        def run(x, packed, scales, *rest):
            shard = zip((rows, blocks), scales.shape, strict=True)
            origin = jnp.stack([_position(axis, mesh) * size for axis, size in shard])
            y = local(x, packed, scales, *rest, origin=origin, pitch=pitch)
            if not _names(summed):
                return y
            return jax.lax.psum(y.astype(jnp.float32), _names(summed)).astype(y.dtype)

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


def _names(axis) -> tuple[str, ...]:
    if axis is None:
        return ()
    return axis if isinstance(axis, tuple) else (axis,)


def _without(axis, *others):
    taken = [name for other in others for name in _names(other)]
    return tuple(name for name in _names(axis) if name not in taken) or None


def _bytes(a) -> int:
    return math.prod(a.shape) * a.dtype.itemsize


def _position(axis, mesh) -> jax.Array:
    """Return which shard of a dimension this device has: the major mesh axis counts most."""
    index = jnp.int32(0)
    for name in _names(axis):
        index = index * mesh.shape[name] + jax.lax.axis_index(name).astype(jnp.int32)
    return index
