"""Building blocks of the Mosaic GPU kernels: registers, raw memory, barriers, matrix instructions.

The kernels are written a thread at a time, as in CUDA, inside `plgpu.inline_mgpu`. Integer
registers are `Int`, floats are plain MLIR values. PTX and the unstable parts of Pallas Mosaic GPU
stay in this file.
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
from jax.extend.mlir.dialects import vector as vector_dialect

from pallas_kernels.mosaic_int import Int, f32, i32, i64

# The dialects that `jax.extend` lacks.
llvm, gpu = utils.llvm, utils.gpu
Value = ir.Value

WARP = 32
WARPGROUP = 128
SHARED_BYTES = 227 * 1024  # of one block on Hopper (CUDA C++ Programming Guide, table of limits)
PAIR_TABLE_WORDS = 256 * WARP

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


def select(condition: ir.Value, yes: Int, no: Int | int) -> Int:
    """`yes` where the condition holds, else `no`."""
    no = Int(no) if isinstance(no, int) else no
    return Int(arith.select(condition, yes.value, no.value))


def both(a: ir.Value, b: ir.Value) -> ir.Value:
    """Whether two conditions hold."""
    return arith.andi(a, b)


# Control


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
    return Int(_asm(i32(), [a, b, c], "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r"))


def sync_block() -> None:
    """Wait for all threads of the block; what they wrote before can be read."""
    gpu.barrier()


def sync_cluster() -> None:
    """Wait for all threads of the cluster, to initialize barriers or before leaving.

    It orders nothing else: a release would wait for every store in flight.
    """
    text = "barrier.cluster.arrive.relaxed; barrier.cluster.wait;"
    _asm(None, [], text, "~{memory}", effects=True)


def sync_threads(barrier: Int, count: int) -> None:
    """Wait for `count` threads at one of the barriers 1 to 15 (0 is `sync_block`)."""
    _asm(None, [barrier], f"bar.sync $0, {count};", "r,~{memory}", effects=True)


def set_registers(count: int, launch: int) -> None:
    """By a warpgroup: hold `count` registers a thread, a multiple of 8; the launch gave `launch`.

    ptxas honours it where each kind of warpgroup has one side of one branch.
    """
    change = "inc" if count > launch else "dec"
    _asm(None, [], f"setmaxnreg.{change}.sync.aligned.u32 {count};", "", effects=True)


def _asm(result, operands, text, constraints, effects=False):
    operands = [o.value if isinstance(o, Int) else o for o in operands]
    result = ir.Type.parse("!llvm.void") if result is None else result
    return llvm.inline_asm(result, operands, text, constraints, has_side_effects=effects)


def sync_warp() -> None:
    """Wait for all lanes of the warp; what they wrote before can be read."""
    _asm(None, [], "bar.warp.sync 0xffffffff;", "~{memory}", effects=True)


def shuffle(value: ir.Value, lane: Int) -> ir.Value:
    """The float `value` of another lane of the warp."""
    text = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
    return _asm(f32(), [value, lane], text, "=f,f,r", effects=True)


# Floats and packed pairs


def zero() -> ir.Value:
    """0.0."""
    return arith.constant(f32(), 0.0)


def add(a: ir.Value, b: ir.Value) -> ir.Value:
    """Sum of two floats."""
    return arith.addf(a, b)


def mul(a: ir.Value, b: ir.Value) -> ir.Value:
    """Product of two floats."""
    return arith.mulf(a, b)


def fma(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """Return a * b + c, rounded once."""
    return math_dialect.fma(a, b, c)


def mul_then_add(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """Return a * b + c with both roundings, which the compiler may not contract."""
    text = "{ .reg .f32 t; mul.rn.f32 t, $1, $2; add.rn.f32 $0, t, $3; }"
    return _asm(f32(), [a, b, c], text, "=f,f,f,f")


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


def _ptx_name(dtype: jax.typing.DTypeLike) -> str:
    return {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]


def pack_pair(low: ir.Value, high: ir.Value, dtype: jax.typing.DTypeLike) -> Int:
    """Round two floats to a 16-bit type and pack them in a word."""
    text = f"cvt.rn.{_ptx_name(dtype)}x2.f32 $0, $1, $2;"
    return Int(_asm(i32(), [high, low], text, "=r,f,f"))


def mul_pairs(a: Int, b: Int, dtype: jax.typing.DTypeLike) -> Int:
    """Product of two words of pairs, element by element."""
    text = f"mul.rn.{_ptx_name(dtype)}x2 $0, $1, $2;"
    return Int(_asm(i32(), [a, b], text, "=r,r,r"))


def permute(a: Int, b: Int, selector: Int) -> Int:
    """The 4 bytes of (a, b) that the nibbles of `selector` number, lowest first."""
    return Int(_asm(i32(), [a, b, selector], "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r"))


def mma(acc: Sequence[ir.Value], a: Sequence[Int], b: Sequence[Int], dtype) -> list[ir.Value]:
    """One m16n8k16 step: acc (4 floats) + a (4 words of pairs) x b (2 words of pairs)."""
    name = _ptx_name(dtype)
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    result = llvm.StructType.get_literal([f32()] * 4)
    out = _asm(result, [*a, *b, *acc], text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f")
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
    return _tied(acc, [*a, b], "\n".join(lines), ["r"] * len(a) + ["l"])


def wgmma_finish(acc: Sequence[ir.Value], a: Sequence[Int]) -> list[ir.Value]:
    """Wait for `wgmma_start`; takes its `a` so that those registers are not used again before."""
    return _tied(acc, a, "wgmma.wait_group.sync.aligned 0;", ["r"] * len(a))


def wgmma_wait(pending: int, a: Sequence[Int]) -> None:
    """Wait until at most `pending` of the products started last still run.

    `a` are left operands of those that end: their registers are not used again before.
    """
    text = f"wgmma.wait_group.sync.aligned {pending};"
    _asm(None, a, text, ",".join(["r"] * len(a) + ["~{memory}"]), effects=True)


def _tied(acc, inputs, text: str, constraints: list[str]) -> list[ir.Value]:
    """Inline code that reads and writes the floats `acc` in place."""
    ties = [str(i) for i in range(len(acc))]
    constraints = ["=f"] * len(acc) + ties + constraints + ["~{memory}"]
    result = llvm.StructType.get_literal([f32()] * len(acc))
    out = _asm(result, [*acc, *inputs], text, ",".join(constraints), effects=True)
    return [llvm.extractvalue(f32(), out, [i]) for i in range(len(acc))]


def matrix_descriptor(address: Int, row_step: int, group_step: int) -> Int:
    """A wgmma operand in shared memory, as blocks of 8 rows of 16 bytes without swizzle.

    `row_step` is the bytes between blocks along k, `group_step` between those of 8 rows.
    """
    constant = (row_step >> 4 << 16) | (group_step >> 4 << 32)
    return (address >> 4 & 0x3FFF).wide() + constant


def swizzled_descriptor(address: Int) -> Int:
    """A wgmma operand in shared memory: rows of 128 bytes along k, swizzled by 128."""
    return (address >> 4 & 0x3FFF).wide() + (1 << 62 | 1024 >> 4 << 32 | 1 << 16)


# Memory: a 32-bit address is in the shared window, a 64-bit one is global.


def shared_address(ref: ir.Value) -> Int:
    """Address of a reference in shared memory."""
    return Int(llvm.ptrtoint(i32(), utils.memref_ptr(ref)))


def global_address(ref: ir.Value) -> Int:
    """Address of a kernel argument."""
    return Int(llvm.ptrtoint(i64(), utils.memref_ptr(ref)))


def _pointer(address: Int) -> ir.Value:
    space = 3 if address.value.type == i32() else 1
    return llvm.inttoptr(llvm.PointerType.get(space), address.value)


def load_float(address: Int) -> ir.Value:
    """Load a float."""
    return llvm.load(f32(), _pointer(address), alignment=4)


def load_floats(address: Int, count: int) -> list[ir.Value]:
    """Load 1, 2 or a multiple of 4 consecutive floats, aligned to that width."""
    if count == 1:
        return [load_float(address)]
    if count > 4:
        parts = [load_floats(address + 16 * i, 4) for i in range(count // 4)]
        return [value for part in parts for value in part]
    vector = llvm.load(ir.VectorType.get((count,), f32()), _pointer(address), alignment=4 * count)
    return [llvm.extractelement(vector, Int(i).value) for i in range(count)]


def load_word(address: Int) -> Int:
    """Load 4 bytes."""
    return Int(llvm.load(i32(), _pointer(address), alignment=4))


def load_words(address: Int) -> list[Int]:
    """Load 4 consecutive words, 16-byte aligned."""
    vector = llvm.load(ir.VectorType.get((4,), i32()), _pointer(address), alignment=16)
    return [Int(llvm.extractelement(vector, Int(i).value)) for i in range(4)]


def load_byte(address: Int) -> Int:
    """Load a byte."""
    byte = llvm.load(ir.IntegerType.get_signless(8), _pointer(address), alignment=1)
    return Int(arith.extui(i32(), byte))


def store(address: Int, value: Int | ir.Value) -> None:
    """Store a value of any type."""
    value = value.value if isinstance(value, Int) else value
    llvm.store(value, _pointer(address), alignment=utils.bytewidth(value.type))


def store_words(address: Int, words: Sequence[Int]) -> None:
    """Store 4 consecutive words, 16-byte aligned."""
    vector = llvm.mlir_undef(ir.VectorType.get((4,), i32()))
    for i, word in enumerate(words):
        vector = llvm.insertelement(vector, word.value, Int(i).value)
    llvm.store(vector, _pointer(address), alignment=16)


def load_matrices(row: Int) -> list[Int]:
    """Load four 8 x 8 matrices of 16-bit values; addresses as in `load_matrices_transposed`.

    Word i holds columns 2 (lane % 4) and the next of row lane / 4 of matrix i.
    """
    return _load_matrices(row, "")


def load_matrices_transposed(row: Int) -> list[Int]:
    """Load four 8 x 8 matrices of 16-bit values, transposed.

    Lane 8 i + j gives the shared address of row j (16 bytes) of matrix i. Word i holds column
    lane / 4 of rows 2 (lane % 4) and the next of matrix i.
    """
    return _load_matrices(row, ".trans")


def _load_matrices(row: Int, kind: str) -> list[Int]:
    text = f"ldmatrix.sync.aligned.m8n8.x4{kind}.shared.b16 {{$0, $1, $2, $3}}, [$4];"
    result = llvm.StructType.get_literal([i32()] * 4)
    out = _asm(result, [row], text, "=r,=r,=r,=r,r,~{memory}", effects=True)
    return [Int(llvm.extractvalue(i32(), out, [i])) for i in range(4)]


def store_floats(address: Int, values: Sequence[ir.Value]) -> None:
    """Store 4 consecutive floats, 16-byte aligned."""
    vector = vector_dialect.from_elements(ir.VectorType.get((4,), f32()), list(values))
    llvm.store(vector, _pointer(address), alignment=16)


def signal(address: Int) -> None:
    """Set a word in device memory to 1, after all that this thread knows to be written."""
    _asm(None, [address], "st.release.gpu.global.b32 [$0], 1;", "l,~{memory}", effects=True)


def await_signal(address: Int) -> None:
    """Wait until a word in device memory is not 0; what was written before can be read."""
    text = (
        "{ .reg .pred zero; .reg .b32 seen;\n"
        "again: ld.acquire.gpu.global.b32 seen, [$0];\n"
        "setp.eq.b32 zero, seen, 0;\n"
        "@zero bra again; }"
    )
    _asm(None, [address], text, "l,~{memory}", effects=True)


def store_matrices_transposed(row: Int, words: Sequence[Int]) -> None:
    """Store four 8 x 8 matrices of 16-bit values, held as mma fragments, transposed.

    Lane 8 i + j gives the shared address of row j (16 bytes) of the stored matrix i.
    """
    text = "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};"
    _asm(None, [row, *words], text, "r,r,r,r,r,~{memory}", effects=True)


# Asynchronous copies


class Barriers:
    """Mbarriers in shared memory, 8 bytes each, completed by arrivals and the bytes they expect.

    They are `count` of those that `ref` holds, from `first` on.
    """

    def __init__(self, ref: ir.Value, count: int, first: Int | None = None):
        self.ref, self.count, self.first = ref, count, Int(0) if first is None else first
        self.base = shared_address(ref) + (self.first << 3)

    def initialize(self, arrivals: int, last: Sequence[int] = ()) -> None:
        """By one thread; the others synchronize with it. `last`: arrivals of the last barriers."""
        arrivals = [arrivals] * (self.count - len(last)) + list(last)
        for i, count in enumerate(arrivals):
            text = f"mbarrier.init.shared::cta.b64 [$0], {count};"
            _asm(None, [self.base + 8 * i], text, "r,~{memory}", effects=True)
        _asm(None, [], "fence.mbarrier_init.release.cluster;", "~{memory}", effects=True)

    def address(self, slot: Int) -> Int:
        """Address of a barrier."""
        return self.base + (slot << 3)

    def expect(self, slot: Int, size: Int) -> None:
        """Arrive, and let the phase wait for `size` bytes."""
        text = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;"
        _asm(None, [self.address(slot), size], text, "r,r,~{memory}", effects=True)

    def arrive(self, slot: Int) -> None:
        """Arrive, after what this thread read and wrote."""
        text = "mbarrier.arrive.shared::cta.b64 _, [$0];"
        _asm(None, [self.address(slot)], text, "r,~{memory}", effects=True)

    def arrive_at(self, slot: Int, rank: Int) -> None:
        """The same, on the barrier of another block of the cluster; orders nothing there."""
        text = (
            "{ .reg .b32 there;\n"
            "mapa.shared::cluster.u32 there, $0, $1;\n"
            "mbarrier.arrive.shared::cluster.b64 _, [there]; }"
        )
        _asm(None, [self.address(slot), rank], text, "r,r,~{memory}", effects=True)

    def reference(self, slot: Int) -> utils.BarrierRef:
        """The same for `copy_tensor`."""
        return utils.BarrierRef(utils.memref_ptr(self.ref), (self.first + slot).value, None, 1)

    def wait(self, slot: Int, parity: Int) -> None:
        """Wait for the phase of this parity (0 first) to complete."""
        text = (
            "{ .reg .pred done;\n"
            "again: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;\n"
            "@!done bra again; }"
        )
        _asm(None, [self.address(slot), parity], text, "r,r,~{memory}", effects=True)


def copy_bulk(target: Int, source: Int, size: Int, barrier: Int) -> None:
    """Copy `size` bytes to shared memory, counted by a barrier; all in multiples of 16 bytes."""
    text = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
    _asm(None, [target, source, size, barrier], text, "r,l,r,r,~{memory}", effects=True)


def copy_async(target: Int, source: Int, size: int, *, keep: bool = True) -> None:
    """Copy 4, 8 or 16 bytes to shared memory, aligned to that; see `commit_copies`.

    With `keep` the sector of 32 bytes stays in L1 for the threads that read the rest of it; without
    it, `size` is 16.
    """
    text = f"cp.async.{'ca' if keep else 'cg'}.shared.global [$0], [$1], {size};"
    _asm(None, [target, source], text, "r,l,~{memory}", effects=True)


def commit_copies() -> None:
    """Make a group of this thread's `copy_async` since the last group."""
    _asm(None, [], "cp.async.commit_group;", "~{memory}", effects=True)


def wait_copies(pending: int) -> None:
    """Wait for this thread's groups but the last `pending`."""
    _asm(None, [], f"cp.async.wait_group {pending};", "~{memory}", effects=True)


def copy_tensor(
    context,
    source: ir.Value,
    target: ir.Value,
    place: Sequence[Int],
    shape,
    barrier,
    swizzle: int,
    shared: bool = False,
) -> None:
    """By one thread: copy a box of a kernel argument; zeros where it passes the end.

    The box starts at `place`; leading dimensions that `shape` lacks are indices. It brings its own
    arrival to the barrier. With `shared`, all blocks of the cluster copy the same box to the same
    slot, each a part of it for all.
    """
    index = ir.IndexType.get()
    starts = [arith.index_castui(index, p.value) for p in place]
    lead = len(starts) - len(shape)
    window = [utils.DynamicSlice(s, size) for s, size in zip(starts[lead:], shape)]
    context.async_copy(
        src_ref=source,
        dst_ref=target,
        gmem_slice=(*starts[:lead], *window),
        barrier=barrier,
        swizzle=swizzle,
        predicate=None,
        collective=(gpu.Dimension.x,) if shared else None,
    )


def element(ref: ir.Value, i: Int) -> ir.Value:
    """The slice ref[i] of a reference in shared memory."""
    return utils.memref_slice(ref, arith.index_castui(ir.IndexType.get(), i.value))


# The pair table: byte value -> its two codes as a 16-bit pair


def load_code(codebook: Int) -> ir.Value:
    """This lane's entry of a codebook [16], for `build_pair_table`; loaded early, used late."""
    return load_float(codebook + ((thread_index() & 15) << 2).wide())


def build_pair_table(table: Int, code: ir.Value, dtype: jax.typing.DTypeLike, warps: int) -> None:
    """Fill the 32 KB table; the caller synchronizes the block.

    Entry e is copied once for each lane (at 128 e + 4 lane), so that no lookup has a bank conflict.
    The high nibble, which comes first along K, is the low half of the pair.
    """
    warp, lane = warp_and_lane(thread_index())
    for first in range(0, 256, warps):
        entry = warp + first
        pair = pack_pair(shuffle(code, entry >> 4), shuffle(code, entry & 15), dtype)
        target = table + (entry << 7) + (lane << 2)
        if first + warps <= 256:
            store(target, pair)
        else:
            with when(entry < 256):
                store(target, pair)


def decode_word(word: Int, table: Int, lane_offset: Int) -> list[Int]:
    """The 8 codes of a packed word as 4 pairs, in the order of K; `lane_offset` is 4 lane."""
    shifted = [word << 7, word >> 1, word >> 9, word >> 17]
    return [load_word(and_or(s, Int(0x7F80), lane_offset) + table) for s in shifted]


def warp_and_lane(index: Int) -> tuple[Int, Int]:
    """Split a thread index into its warp and lane."""
    return index >> 5, index & 31


def uniform(value: Int) -> Int:
    """A value that all lanes of the warp have in common, in a form that the compiler sees it.

    It then keeps what depends on it in uniform registers, and needs no loop to copy by it.
    """
    text = "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;"
    return Int(_asm(i32(), [value], text, "=r,r", effects=True))
