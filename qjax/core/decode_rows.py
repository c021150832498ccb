"""Decoding under `jit` on a mesh: each device decodes its shard of the packed weight.

XLA partitions its own decoding, but gathers whatever feeds a kernel that has no rule. The rule
relates the axes (`b` counts blocks, so a shard never splits one):

    packed [n, b j], scales [n, b] give [n, b i]; a stack of weights has an axis e in front.
"""

import functools
from typing import Any

import jax
from jax.experimental.custom_partitioning import SdyShardingRule, custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

import pallas_kernels
from pallas_kernels.scales import DoubleQuantScales, decode_scales
from qjax.core.placement import padded


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def decode_rows(
    packed: jax.Array,
    scales: jax.Array | DoubleQuantScales,
    table: jax.Array,
    block_size: int,
    dtype: Any,
) -> jax.Array:
    """Return `pallas_kernels.dequantize` of a slice, dtype [N, K], partitioned on a mesh.

    Its derivative, by scales and table, is that of XLA's decoding: kernels have none. `scales` are
    those of a whole weight, without a pitch.
    """
    how = {"block_size": block_size, "dtype": dtype}
    chosen = pallas_kernels.resolve("dequantize", None, packed, scales, table, **how)
    if jax.device_count() == 1 or chosen.implementation == "xla":
        return pallas_kernels.dequantize(packed, scales, table, **how)
    return partitioned(block_size, dtype)(packed, decode_scales(scales), table)


@decode_rows.defjvp
def _(block_size, dtype, operands, tangents):
    how = {"block_size": block_size, "dtype": dtype, "implementation": "xla"}
    _, tangent = jax.jvp(functools.partial(pallas_kernels.dequantize, **how), operands, tangents)
    return decode_rows(*operands, block_size, dtype), tangent


@functools.cache
def partitioned(block_size: int, dtype: Any, implementation: str | None = None):
    """Return f(packed, float32 scales, table) -> dtype [N, K], with the rule."""
    how = {"block_size": block_size, "dtype": dtype, "implementation": implementation}
    local = functools.partial(pallas_kernels.dequantize, **how)
    stack_axes = (0, 0, None)

    @jax.custom_batching.custom_vmap
    def call(packed, scales, table):
        return _with_rule(local, block_size, (), scales.shape[-1] == 1)(packed, scales, table)

    @call.def_vmap
    def batched(axis_size, is_batched, *operands):
        if is_batched == [axis == 0 for axis in stack_axes]:
            return stack(*operands), True
        return jax.vmap(local, in_axes=[0 if b else None for b in is_batched])(*operands), True

    @jax.custom_batching.custom_vmap
    def stack(packed, scales, table):
        many = jax.vmap(local, in_axes=stack_axes)
        return _with_rule(many, block_size, ("e",), scales.shape[-1] == 1)(packed, scales, table)

    @stack.def_vmap
    def stacks(axis_size, is_batched, *operands):
        """Stacks of stacks are left to the compiler to partition."""
        one = jax.vmap(local, in_axes=stack_axes)
        return jax.vmap(one, in_axes=[0 if b else None for b in is_batched])(*operands), True

    return call


def _with_rule(decode, block_size: int, stack: tuple[str, ...], one_block: bool):
    def partition(mesh, arg_shapes, result_shape):
        scales = arg_shapes[1]
        spec = PartitionSpec(*padded(scales.sharding.spec, len(scales.shape)))
        split, whole = NamedSharding(mesh, spec), NamedSharding(mesh, PartitionSpec())
        return mesh, decode, split, (split, split, whole)

    # Rows of one block have no axis of blocks: a rule may not have a factor of 1.
    of_blocks: dict[str, Any] = {} if one_block else {"i": block_size, "j": block_size // 2}
    packed = (*stack, "n", "j" if one_block else ("b", "j"))
    operands: tuple = (packed, (*stack, "n", "b"), ("codes",))
    results: tuple = ((*stack, "n", "i" if one_block else ("b", "i")),)
    wrapped = custom_partitioning(lambda *operands: decode(*operands))
    rule = SdyShardingRule(operands, results, **of_blocks)
    wrapped.def_partition(partition=partition, sharding_rule=rule)
    return wrapped
