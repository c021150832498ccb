"""Building blocks of the Mosaic GPU kernels: threads, control, arithmetic, matrix products.

The kernels are written a thread at a time, as in CUDA, inside `plgpu.inline_mgpu`. Integer
registers are `Int`, floats are plain MLIR values. PTX and the unstable parts of Pallas Mosaic GPU
stay in this file and in `mosaic_memory`.
"""

import contextlib
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, scf
from jax.extend.mlir.dialects import math as math_dialect

from pallas_kernels.mosaic_int import Int, f32, i32

# The dialects that `jax.extend` lacks.
llvm, gpu = utils.llvm, utils.gpu
Value = ir.Value

WARP = 32
WARPGROUP = 128
# Of one block on Hopper. The limit is 227 KB (CUDA C++ Programming Guide, table of limits), but the
# compiler adds a byte of its own, so that a kernel of 227 KB does not start.
SHARED_BYTES = 226 * 1024

# Lane semantics: the bodies are raw threads, and place every barrier themselves.
COMPILER_PARAMS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
)


def device_kind() -> str:
    """Name of the device that the current trace is for; that of an H100 when unknown."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind
    with contextlib.suppress(RuntimeError):
        return jax.devices("gpu")[0].device_kind
    return "NVIDIA H100 80GB HBM3"


def multiprocessors() -> int:
    """Number of SMs of the device that the current trace is for; 132 (H100 SXM) when unknown."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.num_cores:
        return device.num_cores
    with contextlib.suppress(RuntimeError):
        return jax.devices("gpu")[0].core_count
    return 132


def shared_bytes(scratch: dict) -> int:
    """Shared memory of a block that allocates these, each aligned to 1 KB."""
    sizes = (math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize for ref in scratch.values())
    return sum(-(-size // 1024) * 1024 for size in sizes)


# Registers


def element_type(dtype: jax.typing.DTypeLike) -> ir.Type:
    """The MLIR type of a JAX dtype."""
    return utils.dtype_to_ir_type(jnp.dtype(dtype))


def thread_index() -> Int:
    """This thread in its block."""
    return Int(arith.index_cast(i32(), gpu.thread_id(gpu.Dimension.x)))


def block_index() -> Int:
    """This block in the grid."""
    return Int(arith.index_cast(i32(), gpu.block_id(gpu.Dimension.x)))


def cluster_rank() -> Int:
    """This block in its cluster."""
    return Int(arith.index_cast(i32(), gpu.cluster_block_id(gpu.Dimension.x)))


def warp_and_lane(index: Int) -> tuple[Int, Int]:
    """Split a thread index into its warp and lane."""
    return index >> 5, index & 31


def uniform(value: Int) -> Int:
    """A value that all lanes of the warp have in common, in a form that the compiler sees it.

    It then keeps what depends on it in uniform registers, and needs no loop to copy by it.
    """
    text = "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;"
    return Int(asm(i32(), [value], text, "=r,r", effects=True))


def select(condition: ir.Value, yes: Int, no: Int | int) -> Int:
    """`yes` where the condition holds, else `no`."""
    no = Int(no) if isinstance(no, int) else no
    return Int(arith.select(condition, yes.value, no.value))


def select_float(condition: ir.Value, yes: ir.Value, no: ir.Value) -> ir.Value:
    """The float `yes` where the condition holds, else `no`."""
    return arith.select(condition, yes, no)


def both(a: ir.Value, b: ir.Value) -> ir.Value:
    """Whether two conditions hold."""
    return arith.andi(a, b)


def either(a: ir.Value, b: ir.Value) -> ir.Value:
    """Whether one of two conditions holds."""
    return arith.ori(a, b)


# Control


# LLVM does not know which instructions all lanes must run together: it may copy short code over a
# branch on the lane into both of its sides. Keep such instructions, wgmma above all, far from one.
when = utils.when


def branch(condition: ir.Value, yes: Callable[[], None], no: Callable[[], None]) -> None:
    """Run one of two bodies."""
    op = scf.IfOp(condition, [], has_else=True)
    for block, body in ((op.then_block, yes), (op.else_block, no)):
        with ir.InsertionPoint(block):
            body()
            scf.YieldOp([])


def loop(stop: Int, carry: Sequence[ir.Value], body: Callable) -> list[ir.Value]:
    """Run `carry = body(i, carry)` for i in [0, stop)."""
    op = scf.ForOp(Int(0).value, stop.value, Int(1).value, list(carry))
    with ir.InsertionPoint(op.body):
        scf.YieldOp(body(Int(op.induction_variable), list(op.inner_iter_args)))
    return list(op.results)


def and_or(a: Int, b: Int, c: Int) -> Int:
    """(a & b) | c in one instruction; plain operators become two when an addition follows."""
    return Int(asm(i32(), [a, b, c], "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r"))


def sync_block() -> None:
    """Wait for all threads of the block; what they wrote before can be read."""
    gpu.barrier()


def sync_cluster() -> None:
    """Wait for all threads of the cluster, to initialize barriers or before leaving.

    It orders nothing else: a release would wait for every store in flight.
    """
    arrive_at_cluster()
    await_cluster()


def arrive_at_cluster() -> None:
    """By all threads of the cluster: the first half of `sync_cluster`."""
    asm(None, [], "barrier.cluster.arrive.relaxed;", "~{memory}", effects=True)


def await_cluster() -> None:
    """By all threads of the cluster: the second half of `sync_cluster`."""
    asm(None, [], "barrier.cluster.wait;", "~{memory}", effects=True)


def sync_threads(barrier: Int, count: int) -> None:
    """Wait for `count` threads at one of the barriers 1 to 15 (0 is `sync_block`)."""
    asm(None, [barrier], f"bar.sync $0, {count};", "r,~{memory}", effects=True)


def set_registers(count: int, launch: int) -> None:
    """By a warpgroup: hold `count` registers a thread, a multiple of 8; the launch gave `launch`.

    ptxas honours it where each kind of warpgroup has one side of one branch.
    """
    change = "inc" if count > launch else "dec"
    asm(None, [], f"setmaxnreg.{change}.sync.aligned.u32 {count};", "", effects=True)


def asm(
    result: ir.Type | None, operands: Sequence, text: str, constraints: str, effects: bool = False
):
    """Inline PTX: its result, or None for none. With `effects` it is neither moved nor dropped."""
    operands = [o.value if isinstance(o, Int) else o for o in operands]
    result = ir.Type.parse("!llvm.void") if result is None else result
    return llvm.inline_asm(result, operands, text, constraints, has_side_effects=effects)


def sync_warp() -> None:
    """Wait for all lanes of the warp; what they wrote before can be read."""
    asm(None, [], "bar.warp.sync 0xffffffff;", "~{memory}", effects=True)


def shuffle(value: ir.Value, lane: Int) -> ir.Value:
    """The float `value` of another lane of the warp."""
    text = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
    return asm(f32(), [value, lane], text, "=f,f,r", effects=True)


# Floats and packed pairs


def zero() -> ir.Value:
    """0.0."""
    return arith.constant(f32(), 0.0)


def add(a: ir.Value, b: ir.Value) -> ir.Value:
    """Sum of two floats."""
    return arith.addf(a, b)


def fma(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """Return a * b + c, rounded once."""
    return math_dialect.fma(a, b, c)


def mul_then_add(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """Return a * b + c with both roundings, which the compiler may not contract."""
    text = "{ .reg .f32 t; mul.rn.f32 t, $1, $2; add.rn.f32 $0, t, $3; }"
    return asm(f32(), [a, b, c], text, "=f,f,f,f")


def tree_sum(values: Sequence[ir.Value]) -> ir.Value:
    """Sum of floats, in a fixed order."""
    values = list(values)
    while len(values) > 1:
        pairs = zip(values[0::2], values[1::2])
        values = [add(a, b) for a, b in pairs] + values[len(values) & ~1 :]
    return values[0]


def round_to(value: ir.Value, dtype: jax.typing.DTypeLike) -> ir.Value:
    """A float in another dtype."""
    type_ = element_type(dtype)
    return value if type_ == value.type else arith.truncf(type_, value)


def widen(halves: ir.Value, count: int) -> list[ir.Value]:
    """The 16-bit floats of a vector, as floats."""
    parts = (llvm.extractelement(halves, Int(i).value) for i in range(count))
    return [arith.extf(f32(), part) for part in parts]


def _ptx_name(dtype: jax.typing.DTypeLike) -> str:
    return {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]


def pack_pair(low: ir.Value, high: ir.Value, dtype: jax.typing.DTypeLike) -> Int:
    """Round two floats to a 16-bit type and pack them in a word."""
    text = f"cvt.rn.{_ptx_name(dtype)}x2.f32 $0, $1, $2;"
    return Int(asm(i32(), [high, low], text, "=r,f,f"))


def mul_pairs(a: Int, b: Int, dtype: jax.typing.DTypeLike) -> Int:
    """Product of two words of pairs, element by element."""
    text = f"mul.rn.{_ptx_name(dtype)}x2 $0, $1, $2;"
    return Int(asm(i32(), [a, b], text, "=r,r,r"))


def permute(a: Int, b: Int, selector: Int) -> Int:
    """The 4 bytes of (a, b) that the nibbles of `selector` number, lowest first."""
    return Int(asm(i32(), [a, b, selector], "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r"))


def mma(acc: Sequence[ir.Value], a: Sequence[Int], b: Sequence[Int], dtype) -> list[ir.Value]:
    """One m16n8k16 step: acc (4 floats) + a (4 words of pairs) x b (2 words of pairs)."""
    name = _ptx_name(dtype)
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    result = llvm.StructType.get_literal([f32()] * 4)
    out = asm(result, [*a, *b, *acc], text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f")
    return [llvm.extractvalue(f32(), out, [i]) for i in range(4)]


def wgmma_start(
    acc: Sequence[ir.Value], a: Sequence[Int], b: Int, b_step: int, dtype
) -> list[ir.Value]:
    """Start acc[64, n] += a[64, 16 s] @ b[16 s, n] by a warpgroup; `wgmma_finish` must follow.

    Args:
        acc: n / 2 floats.
        a: 4 words of pairs for each of the s steps of 16 k.
        b: the matrix descriptor of the first step, in shared memory.
        b_step: what a step adds to the descriptor.
    """
    n, steps, name = 2 * len(acc), len(a) // 4, _ptx_name(dtype)
    shape = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{name}.{name}"
    first = 2 * len(acc)  # outputs, then the inputs tied to them
    sums = ", ".join(f"${i}" for i in range(len(acc)))
    # The step changes the low word alone: 64-bit sums would take most of the instructions.
    lines = ["{ .reg .b64 b; .reg .b32 low, high; .reg .pred p; setp.ne.b32 p, 1, 0;"]
    lines.append(f"mov.b64 b, ${first + len(a)}; mov.b64 {{low, high}}, b;")
    lines.append("wgmma.fence.sync.aligned;")
    for s in range(steps):
        words = ", ".join(f"${first + 4 * s + i}" for i in range(4))
        lines.append(f"{shape} {{{sums}}}, {{{words}}}, b, p, 1, 1, 0;")
        lines.append(f"add.u32 low, low, {b_step}; mov.b64 b, {{low, high}};")
    lines.append("wgmma.commit_group.sync.aligned; }")
    return update(acc, [*a, b], "\n".join(lines), ["r"] * len(a) + ["l"])


def wgmma_finish(acc: Sequence[ir.Value], a: Sequence[Int]) -> list[ir.Value]:
    """Wait for `wgmma_start`; takes its `a` so that those registers are not used again before."""
    return update(acc, a, "wgmma.wait_group.sync.aligned 0;", ["r"] * len(a))


def wgmma_wait(pending: int, a: Sequence[Int]) -> None:
    """Wait until at most `pending` of the products started last still run.

    `a` are left operands of those that end: their registers are not used again before.
    """
    text = f"wgmma.wait_group.sync.aligned {pending};"
    asm(None, a, text, ",".join(["r"] * len(a) + ["~{memory}"]), effects=True)


def update(acc, inputs, text: str, constraints: list[str]) -> list[ir.Value]:
    """Inline code that reads and writes the floats `acc` in place."""
    ties = [str(i) for i in range(len(acc))]
    constraints = ["=f"] * len(acc) + ties + constraints + ["~{memory}"]
    result = llvm.StructType.get_literal([f32()] * len(acc))
    out = asm(result, [*acc, *inputs], text, ",".join(constraints), effects=True)
    return [llvm.extractvalue(f32(), out, [i]) for i in range(len(acc))]


def swizzled_descriptor(address: Int) -> Int:
    """A wgmma operand in shared memory: rows of 128 bytes along k, swizzled by 128."""
    return (address >> 4 & 0x3FFF).wide() + (1 << 62 | 1024 >> 4 << 32 | 1 << 16)
