"""Runs the bodies of the Mosaic matmul kernels on the CPU, all threads of a block in step.

It replaces the primitives of `pallas_kernels.mosaic` and `mosaic_memory` by numpy, on the memory
and barriers of `simulated_machine`; `when` is a mask. When a block ends, a copy that nobody has
waited for is an error. It shows wrong addresses, layouts and counts; it does not show races. Where
a kernel's threads have roles, each role runs by itself, and its waits last until others act.
"""

import contextlib
import functools

import numpy as np

from pallas_kernels import mosaic, mosaic_memory
from tests.pallas_kernels import simulated_machine as on
from tests.pallas_kernels.simulated_machine import (
    Barriers,
    Register,
    commit_copies,
    copy_async,
    copy_bulk,
    copy_tensor,
    remote_address,
    send,
    wait_copies,
)

WARP = 32


@contextlib.contextmanager
def when(condition):
    outer = on.machine.mask
    on.machine.mask = outer & condition
    yield
    on.machine.mask = outer


def branch(condition, yes, no):
    with when(condition):
        yes()
    with when(~condition):
        no()


def loop(stop, carry, body):
    outer, carry = on.machine.mask, list(carry)
    for i in range(int(stop.value[outer].max(initial=0))):
        on.machine.mask = outer & (i < stop.value)
        new = body(Register(i), carry)
        carry = [np.where(on.machine.mask, b, a) for a, b in zip(carry, new)]
    on.machine.mask = outer
    return carry


def lookup_lane(value, lane):
    return value.reshape(-1, WARP)[np.arange(on.machine.threads) // WARP, lane.value]


def unpack(word, dtype):
    return word.value[:, None].view(np.dtype(dtype)).astype(np.float32)


def pack(pairs, dtype):
    return Register(pairs.astype(np.dtype(dtype)).view(np.uint32)[:, 0])


GROUP, QUAD = np.arange(WARP) // 4, np.arange(WARP) % 4


def left_operand(words, dtype):
    """[warps, 16, 16] from the fragments of an mma's left operand (PTX ISA, m16n8k16)."""
    out = np.empty((on.machine.threads // WARP, 16, 16), np.float32)
    for i, word in enumerate(words):
        pairs = unpack(word, dtype).reshape(-1, WARP, 2)
        for e in range(2):
            out[:, GROUP + 8 * (i % 2), 2 * QUAD + 8 * (i // 2) + e] = pairs[:, :, e]
    return out


def fragments(result):
    """The 4 floats a thread of [warps, 16, 8]."""
    values = (result[:, GROUP + 8 * (r // 2), 2 * QUAD + r % 2] for r in range(4))
    return [value.reshape(-1) for value in values]


def mma(acc, a, b, dtype):
    right = np.empty((on.machine.threads // WARP, 16, 8), np.float32)
    for i, word in enumerate(b):
        pairs = unpack(word, dtype).reshape(-1, WARP, 2)
        for e in range(2):
            right[:, 2 * QUAD + 8 * i + e, GROUP] = pairs[:, :, e]
    product = fragments(left_operand(a, dtype) @ right)
    return [x + y for x, y in zip(acc, product)]


def wgmma_start(acc, a, b, b_step, dtype):
    acc, columns = list(acc), 2 * len(acc)
    for step in range(len(a) // 4):
        left = left_operand(a[4 * step : 4 * step + 4], dtype)
        right = np.stack([right_operand(int(d), columns, dtype) for d in b.value[::WARP]])
        product = left @ right
        for column in range(columns // 8):
            part = fragments(product[:, :, 8 * column : 8 * column + 8])
            acc[4 * column : 4 * column + 4] = [
                x + y for x, y in zip(acc[4 * column : 4 * column + 4], part)
            ]
        b = b + b_step
    return acc


def right_operand(descriptor, columns, dtype):
    """[16, columns]: columns of 128 bytes along k, swizzled."""
    assert descriptor >> 62 == 1
    start, along_n = ((descriptor >> s & 0x3FFF) << 4 for s in (0, 32))
    k, n = np.arange(16)[:, None], np.arange(columns)[None]
    place = start + n // 8 * along_n + n % 8 * 128 + k * 2
    place = place ^ (place >> 7 & 7) << 4
    data = on.machine.shared[place[..., None] + np.arange(2)]
    return data.view(np.dtype(dtype))[..., 0].astype(np.float32)


def matrices(row):
    """[warps, 4, 8, 8]: what lanes 8 i.. address as matrix i, a row each."""
    address = np.where(on.machine.mask, row.value, 1024).reshape(-1, 4, 8)
    assert (address % 16 == 0).all()
    return on.machine.shared[address[..., None] + np.arange(16)].view(np.uint16)


def load_matrices(row):
    data = matrices(row).view(np.uint32)
    return [Register(data[:, i, GROUP, QUAD].reshape(-1)) for i in range(4)]


def load_matrices_transposed(row):
    data = matrices(row)
    words = []
    for i in range(4):
        low, high = (data[:, i, 2 * QUAD + e, GROUP].astype(np.uint32) for e in range(2))
        words.append(Register((low | high << 16).reshape(-1)))
    return words


def store_matrices_transposed(row, words):
    address = row.value.reshape(-1, 4, 8)
    for warp in np.flatnonzero(on.machine.mask[::WARP]):
        for i, word in enumerate(words):
            pairs = word.value.reshape(-1, WARP)[warp]
            matrix = np.empty((8, 8), np.uint16)  # [row of the fragment, column]
            matrix[GROUP, 2 * QUAD], matrix[GROUP, 2 * QUAD + 1] = pairs & 0xFFFF, pairs >> 16
            for line in range(8):
                start = int(address[warp, i, line])
                assert start % 16 == 0
                on.machine.shared[start : start + 16] = matrix[:, line].copy().view(np.uint8)


def permute(a, b, selector):
    both = (b.value.astype(np.uint64) << np.uint64(32)) | a.value
    out = np.zeros(on.machine.threads, np.uint32)
    for i in range(4):
        nibble = selector.value >> np.uint32(4 * i) & np.uint32(15)
        assert (nibble < 8).all()
        byte = both >> (nibble.astype(np.uint64) * np.uint64(8)) & np.uint64(255)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return Register(out)


def load_words_where(condition, address):
    with when(condition):
        return PRIMITIVES["load_words"](address)


class AwaitsBlock(Exception):
    """A block waits for one that has not run."""


def await_signal(address, tag):
    seen = on.machine.load(address, 8)[on.machine.mask].view(np.uint64)[:, 0]
    if (seen != tag.value[on.machine.mask]).any():
        raise AwaitsBlock
    on.machine.store(address, np.zeros(on.machine.threads, np.uint64))


def float_of(data):
    return data.view(np.float32)[:, 0]


PRIMITIVES = {
    "Int": Register,
    "Barriers": Barriers,
    "thread_index": lambda: Register(np.arange(on.machine.threads, dtype=np.uint32)),
    "block_index": lambda: Register(on.machine.block),
    "cluster_rank": lambda: Register(on.machine.block % max(2, len(on.machine.cluster))),
    "select": lambda c, yes, no: Register(np.where(c, yes.value, Register(no).value)),
    "select_float": lambda c, yes, no: np.where(c, yes, no),
    "both": lambda a, b: a & b,
    "either": lambda a, b: a | b,
    "when": when,
    "branch": branch,
    "loop": loop,
    "sync_block": lambda: None,
    "sync_cluster": lambda: on.machine.met.wait(on.machine.patience),
    "arrive_at_cluster": lambda: None,
    "await_cluster": lambda: on.machine.met.wait(on.machine.patience),
    "sync_warp": lambda: None,
    "uniform": lambda value: value,
    "shuffle": lookup_lane,
    "and_or": lambda a, b, c: (a & b) | c,
    "zero": lambda: np.zeros(on.machine.threads, np.float32),
    "add": lambda a, b: a + b,
    "fma": lambda a, b, c: a * b + c,
    "mul_then_add": lambda a, b, c: a * b + c,
    "round_to": lambda value, dtype: value.astype(np.dtype(dtype)),
    "widen": lambda halves, count: list(halves.astype(np.float32).T),
    "pack_pair": lambda low, high, dtype: pack(np.stack([low, high], -1), dtype),
    "mul_pairs": lambda a, b, dtype: pack(unpack(a, dtype) * unpack(b, dtype), dtype),
    "mma": mma,
    "wgmma_start": wgmma_start,
    "wgmma_finish": lambda acc, a: acc,
    "wgmma_wait": lambda pending, a: None,
    "permute": permute,
    "sync_threads": lambda barrier, count: None,
    "grid_tag": lambda: Register(np.full(on.machine.threads, 0xF00D << 32, np.uint64)),
    "signal": lambda address, tag: on.machine.store(address, tag),
    "await_signal": await_signal,
    "fence_proxy": lambda: None,
    "store_words": lambda address, words: on.machine.store_bytes(
        address, np.stack([word.value for word in words], -1).view(np.uint8)
    ),
    "store_floats": lambda address, values: on.machine.store_bytes(
        address, np.stack(values, -1).view(np.uint8)
    ),
    "load_matrices": load_matrices,
    "load_matrices_transposed": load_matrices_transposed,
    "store_matrices_transposed": store_matrices_transposed,
    "shared_address": lambda ref: Register(ref.address),
    "global_address": lambda ref: Register(np.full(on.machine.threads, ref.address, np.uint64)),
    "load_float": lambda address: float_of(on.machine.load(address, 4)),
    "prefetch": lambda address: on.machine.load(address, 1),
    "load_half": lambda address, dtype: (
        on.machine.load(address, 2).view(np.dtype(dtype))[:, 0].astype(np.float32)
    ),
    "load_halves": lambda address, count, dtype: on.machine.load(address, 2 * count).view(
        np.dtype(dtype)
    ),
    "load_word": lambda address: Register(on.machine.load(address, 4).view(np.uint32)[:, 0]),
    "load_byte": lambda address: Register(on.machine.load(address, 1)[:, 0].astype(np.uint32)),
    "load_words": lambda address: [
        Register(word) for word in on.machine.load(address, 16).view(np.uint32).T
    ],
    "load_words_where": load_words_where,
    "load_floats": lambda address, count: (
        list(on.machine.load(address, 4 * count).view(np.float32).T)
        if count <= 4
        else PRIMITIVES["load_floats"](address, 4)
        + PRIMITIVES["load_floats"](address + 16, count - 4)
    ),
    "add_floats": lambda values, address: [
        a + b for a, b in zip(values, PRIMITIVES["load_floats"](address, 4))
    ],
    "store": lambda address, value: on.machine.store(address, value),
    "remote_address": remote_address,
    "send": send,
    "copy_bulk": copy_bulk,
    "copy_async": copy_async,
    "commit_copies": commit_copies,
    "wait_copies": wait_copies,
    "copy_tensor": copy_tensor,
    "element": lambda ref, i: (ref, i),
}


def allocate(value):
    """A reference to an array, or a tuple of them."""
    return (
        tuple(map(allocate, value))
        if isinstance(value, tuple)
        else on.machine.allocate_global(value)
    )


def simulate(
    monkeypatch,
    layout,
    tiles,
    blocks,
    threads,
    operands,
    out,
    make_block,
    together=1,
    cluster=1,
):
    """Run `make_block(references, out, scratch).run()` for each block; gives the output array.

    Of `together` neighbours, each may wait for the others through device memory; those that do run
    once more, when all have come as far as they can. The `cluster` blocks of a cluster run at once;
    by itself, a block of a pair gets from the other what it sends.
    """
    machine = on.start(threads, cluster)
    for name, value in PRIMITIVES.items():
        module = mosaic if hasattr(mosaic, name) else mosaic_memory
        monkeypatch.setattr(module, name, value)
    references = type(operands)(*map(allocate, operands))
    target = machine.allocate_global(out)

    def run(block: int) -> None:
        body = make_block(references, target, machine.start_block(block, layout.scratch(tiles)))
        if hasattr(body, "roles"):
            body.setup()
            machine.run_roles(body)
            return
        body.run()
        phases = [phase for phase in machine.barriers.values() if phase.copies]
        assert all(phase.waited == phase.completed for phase in phases)
        machine.here.ended = True

    def ends(block: int) -> bool:
        try:
            if cluster == 1:
                run(block)
            else:
                machine.run_all([functools.partial(run, block + rank) for rank in range(cluster)])
        except AwaitsBlock:
            return False
        return True

    with np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, blocks, together * cluster):
            some = range(first, first + together * cluster, cluster)
            waiting = [block for block in some if not ends(block)]
            assert all(map(ends, waiting)), "waits for a block that starts later"
    data = machine.memory(target.address)[0][: out.nbytes]
    return data.view(out.dtype).reshape(out.shape)
