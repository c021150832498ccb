"""Memory in the Mosaic GPU kernels: loads and stores, asynchronous copies and their barriers.

A 32-bit address is in the window of shared memory, a 64-bit one is global. Of another block of the
cluster, `remote_address` gives what `send` takes, and nothing else.
"""

from collections.abc import Sequence

from jax.experimental.mosaic.gpu import utils
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith
from jax.extend.mlir.dialects import vector as vector_dialect

from pallas_kernels import mosaic as mg
from pallas_kernels.mosaic_int import f32, i32, i64

llvm, gpu = utils.llvm, utils.gpu  # which `jax.extend` lacks


def shared_address(ref: ir.Value) -> mg.Int:
    """Address of a reference in shared memory."""
    return mg.Int(llvm.ptrtoint(i32(), utils.memref_ptr(ref)))


def global_address(ref: ir.Value) -> mg.Int:
    """Address of a kernel argument."""
    return mg.Int(llvm.ptrtoint(i64(), utils.memref_ptr(ref)))


def _pointer(address: mg.Int) -> ir.Value:
    space = 3 if address.value.type == i32() else 1
    return llvm.inttoptr(llvm.PointerType.get(space), address.value)


def load_float(address: mg.Int) -> ir.Value:
    """Load a float."""
    return llvm.load(f32(), _pointer(address), alignment=4)


def load_half(address: mg.Int, dtype) -> ir.Value:
    """Load a 16-bit float as a float."""
    half = llvm.load(mg.element_type(dtype), _pointer(address), alignment=2)
    return arith.extf(f32(), half)


def load_halves(address: mg.Int, count: int, dtype) -> ir.Value:
    """Load 2, 4 or 8 consecutive 16-bit floats, aligned to that width, as one vector."""
    type_ = ir.VectorType.get((count,), mg.element_type(dtype))
    return llvm.load(type_, _pointer(address), alignment=2 * count)


def load_floats(address: mg.Int, count: int) -> list[ir.Value]:
    """Load 1, 2 or a multiple of 4 consecutive floats, aligned to that width."""
    if count == 1:
        return [load_float(address)]
    if count > 4:
        parts = [load_floats(address + 16 * i, 4) for i in range(count // 4)]
        return [value for part in parts for value in part]
    vector = llvm.load(ir.VectorType.get((count,), f32()), _pointer(address), alignment=4 * count)
    return [llvm.extractelement(vector, mg.Int(i).value) for i in range(count)]


def add_floats(values: Sequence[ir.Value], address: mg.Int) -> list[ir.Value]:
    """Add to 4 floats, in their registers, 4 consecutive ones from shared memory."""
    text = "{ .reg .f32 t<4>; ld.shared.v4.f32 {t0, t1, t2, t3}, [$8]; "
    text += " ".join(f"add.f32 ${i}, ${i}, t{i};" for i in range(4)) + " }"
    return mg.update(values, [address], text, ["r"])


def load_word(address: mg.Int) -> mg.Int:
    """Load 4 bytes."""
    return mg.Int(llvm.load(i32(), _pointer(address), alignment=4))


def load_words(address: mg.Int) -> list[mg.Int]:
    """Load 4 consecutive words, 16-byte aligned."""
    vector = llvm.load(ir.VectorType.get((4,), i32()), _pointer(address), alignment=16)
    return [mg.Int(llvm.extractelement(vector, mg.Int(i).value)) for i in range(4)]


def load_words_where(condition: ir.Value, address: mg.Int) -> list[mg.Int]:
    """Load 4 consecutive global words that nobody writes, 16-byte aligned; elsewhere zeros.

    A load and nothing else, so that the first use waits for it and not a choice between the two.
    """
    text = (
        "{ .reg .pred p; setp.ne.b32 p, $5, 0;\n"
        "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;\n"
        "@p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4]; }"
    )
    result = llvm.StructType.get_literal([i32()] * 4)
    operands = [address, arith.extui(i32(), condition)]
    out = mg.asm(result, operands, text, "=&r,=&r,=&r,=&r,l,r", effects=True)
    return [mg.Int(llvm.extractvalue(i32(), out, [i])) for i in range(4)]


def load_byte(address: mg.Int) -> mg.Int:
    """Load a byte."""
    byte = llvm.load(ir.IntegerType.get_signless(8), _pointer(address), alignment=1)
    return mg.Int(arith.extui(i32(), byte))


def prefetch(address: mg.Int) -> None:
    """Start to bring what is at a global address to the L2 cache."""
    mg.asm(None, [address], "prefetch.global.L2 [$0];", "l,~{memory}", effects=True)


def store(address: mg.Int, value: mg.Int | ir.Value) -> None:
    """Store a value of any type."""
    value = value.value if isinstance(value, mg.Int) else value
    llvm.store(value, _pointer(address), alignment=utils.bytewidth(value.type))


def store_words(address: mg.Int, words: Sequence[mg.Int]) -> None:
    """Store 4 consecutive words, 16-byte aligned."""
    vector = llvm.mlir_undef(ir.VectorType.get((4,), i32()))
    for i, word in enumerate(words):
        vector = llvm.insertelement(vector, word.value, mg.Int(i).value)
    llvm.store(vector, _pointer(address), alignment=16)


def load_matrices(row: mg.Int) -> list[mg.Int]:
    """Load four 8 x 8 matrices of 16-bit values; addresses as in `load_matrices_transposed`.

    Word i holds columns 2 (lane % 4) and the next of row lane / 4 of matrix i.
    """
    return _load_matrices(row, "")


def load_matrices_transposed(row: mg.Int) -> list[mg.Int]:
    """Load four 8 x 8 matrices of 16-bit values, transposed.

    Lane 8 i + j gives the shared address of row j (16 bytes) of matrix i. Word i holds column
    lane / 4 of rows 2 (lane % 4) and the next of matrix i.
    """
    return _load_matrices(row, ".trans")


def _load_matrices(row: mg.Int, kind: str) -> list[mg.Int]:
    text = f"ldmatrix.sync.aligned.m8n8.x4{kind}.shared.b16 {{$0, $1, $2, $3}}, [$4];"
    result = llvm.StructType.get_literal([i32()] * 4)
    out = mg.asm(result, [row], text, "=r,=r,=r,=r,r,~{memory}", effects=True)
    return [mg.Int(llvm.extractvalue(i32(), out, [i])) for i in range(4)]


def store_floats(address: mg.Int, values: Sequence[ir.Value]) -> None:
    """Store 4 consecutive floats, 16-byte aligned."""
    vector = vector_dialect.from_elements(ir.VectorType.get((4,), f32()), list(values))
    llvm.store(vector, _pointer(address), alignment=16)


def grid_tag() -> mg.Int:
    """64 bits that other launches and ordinary data do not have."""
    text = (
        "{ .reg .b64 grid; mov.u64 grid, %gridid; add.u64 grid, grid, 1;\n"
        "mul.lo.u64 $0, grid, 0x9E3779B97F4A7C15; }"
    )
    return mg.Int(mg.asm(i64(), [], text, "=l"))


def signal(address: mg.Int, tag: mg.Int) -> None:
    """Write a tag to device memory, after all that this thread knows to be written."""
    text = "st.release.gpu.global.b64 [$0], $1;"
    mg.asm(None, [address, tag], text, "l,l,~{memory}", effects=True)


def await_signal(address: mg.Int, tag: mg.Int) -> None:
    """By the one reader: wait for `signal`, and clear it; what was written before can be read.

    The memory need not be cleared before: no launch finds the tag of another.
    """
    text = (
        "{ .reg .pred waits; .reg .b64 seen;\n"
        "again: ld.acquire.gpu.global.b64 seen, [$0];\n"
        "setp.ne.b64 waits, seen, $1;\n"
        "@waits bra again; st.global.b64 [$0], 0; }"
    )
    mg.asm(None, [address, tag], text, "l,l,~{memory}", effects=True)


def fence_proxy() -> None:
    """Let copies that this thread starts later read the global memory it knows to be written."""
    mg.asm(None, [], "fence.proxy.async.global;", "~{memory}", effects=True)


def store_matrices_transposed(row: mg.Int, words: Sequence[mg.Int]) -> None:
    """Store four 8 x 8 matrices of 16-bit values, held as mma fragments, transposed.

    Lane 8 i + j gives the shared address of row j (16 bytes) of the stored matrix i.
    """
    text = "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};"
    mg.asm(None, [row, *words], text, "r,r,r,r,r,~{memory}", effects=True)


# Asynchronous copies


class Barriers:
    """Mbarriers in shared memory, 8 bytes each, completed by arrivals and the bytes they expect.

    They are `count` of those that `ref` holds, from `first` on.
    """

    def __init__(self, ref: ir.Value, count: int, first: mg.Int | None = None):
        self.ref, self.count, self.first = ref, count, mg.Int(0) if first is None else first
        self.base = shared_address(ref) + (self.first << 3)

    def initialize(self, arrivals: int, last: Sequence[int] = ()) -> None:
        """By one thread; the others synchronize with it. `last`: arrivals of the last barriers."""
        arrivals = [arrivals] * (self.count - len(last)) + list(last)
        for i, count in enumerate(arrivals):
            text = f"mbarrier.init.shared::cta.b64 [$0], {count};"
            mg.asm(None, [self.base + 8 * i], text, "r,~{memory}", effects=True)
        mg.asm(None, [], "fence.mbarrier_init.release.cluster;", "~{memory}", effects=True)

    def address(self, slot: mg.Int) -> mg.Int:
        """Address of a barrier."""
        return self.base + (slot << 3)

    def expect(self, slot: mg.Int, size: mg.Int) -> None:
        """Arrive, and let the phase wait for `size` bytes."""
        text = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;"
        mg.asm(None, [self.address(slot), size], text, "r,r,~{memory}", effects=True)

    def arrive(self, slot: mg.Int) -> None:
        """Arrive, after what this thread read and wrote."""
        text = "mbarrier.arrive.shared::cta.b64 _, [$0];"
        mg.asm(None, [self.address(slot)], text, "r,~{memory}", effects=True)

    def arrive_at(self, slot: mg.Int, rank: mg.Int) -> None:
        """The same, on the barrier of another block of the cluster; orders nothing there."""
        text = (
            "{ .reg .b32 there;\n"
            "mapa.shared::cluster.u32 there, $0, $1;\n"
            "mbarrier.arrive.shared::cluster.b64 _, [there]; }"
        )
        mg.asm(None, [self.address(slot), rank], text, "r,r,~{memory}", effects=True)

    def reference(self, slot: mg.Int) -> utils.BarrierRef:
        """The same for `copy_tensor`."""
        return utils.BarrierRef(utils.memref_ptr(self.ref), (self.first + slot).value, None, 1)

    def wait(self, slot: mg.Int, parity: mg.Int) -> None:
        """Wait for the phase of this parity (0 first) to complete."""
        text = (
            "{ .reg .pred done;\n"
            "again: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;\n"
            "@!done bra again; }"
        )
        mg.asm(None, [self.address(slot), parity], text, "r,r,~{memory}", effects=True)


def remote_address(address: mg.Int, rank: mg.Int) -> mg.Int:
    """What lies at this block's shared `address`, in the block of that rank of the cluster."""
    text = "mapa.shared::cluster.u32 $0, $1, $2;"
    return mg.Int(mg.asm(i32(), [address, rank], text, "=r,r,r"))


def send(address: mg.Int, values: Sequence[ir.Value], barrier: mg.Int) -> None:
    """Store 1, 2 or 4 floats, aligned, at a remote address, whose block's barrier counts the bytes.

    Who waits for the barrier sees them; both addresses are remote ones of the same block.
    """
    vector = {1: "", 2: ".v2", 4: ".v4"}[len(values)]
    registers = ", ".join(f"${i + 2}" for i in range(len(values)))
    registers = f"{{{registers}}}" if vector else registers
    text = f"st.async.weak.shared::cluster.mbarrier::complete_tx::bytes{vector}.f32"
    text += f" [$0], {registers}, [$1];"
    constraints = ",".join(["r", "r", *["f"] * len(values), "~{memory}"])
    mg.asm(None, [address, barrier, *values], text, constraints, effects=True)


def copy_bulk(target: mg.Int, source: mg.Int, size: mg.Int, barrier: mg.Int) -> None:
    """Copy `size` bytes to shared memory, counted by a barrier; all in multiples of 16 bytes."""
    text = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
    mg.asm(None, [target, source, size, barrier], text, "r,l,r,r,~{memory}", effects=True)


def copy_async(target: mg.Int, source: mg.Int, size: int, *, keep: bool = True) -> None:
    """Copy 4, 8 or 16 bytes to shared memory, aligned to that; see `commit_copies`.

    With `keep` the sector of 32 bytes stays in L1 for the threads that read the rest of it; without
    it, `size` is 16.
    """
    text = f"cp.async.{'ca' if keep else 'cg'}.shared.global [$0], [$1], {size};"
    mg.asm(None, [target, source], text, "r,l,~{memory}", effects=True)


def commit_copies() -> None:
    """Make a group of this thread's `copy_async` since the last group."""
    mg.asm(None, [], "cp.async.commit_group;", "~{memory}", effects=True)


def wait_copies(pending: int) -> None:
    """Wait for this thread's groups but the last `pending`."""
    mg.asm(None, [], f"cp.async.wait_group {pending};", "~{memory}", effects=True)


def copy_tensor(
    context,
    source: ir.Value,
    target: ir.Value,
    place: Sequence[mg.Int],
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


def element(ref: ir.Value, i: mg.Int) -> ir.Value:
    """The slice ref[i] of a reference in shared memory."""
    return utils.memref_slice(ref, arith.index_castui(ir.IndexType.get(), i.value))
