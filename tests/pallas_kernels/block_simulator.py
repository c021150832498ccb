"""Runs the bodies of the Mosaic matmul kernels on the CPU, all threads of a block in step.

It replaces the primitives of `pallas_kernels.mosaic` and `mosaic_memory` by numpy: a register is an
array with an element a thread, `when` a mask, a copy happens at once. Barriers count arrivals and
bytes; a wait for a phase that is not complete is an error, as are accesses out of bounds and, when
a block ends, a copy that nobody has waited for. Small asynchronous copies arrive when they are
waited for. Shared memory and the output start as NaN. It shows wrong addresses, layouts and counts;
it does not show races. Where a kernel's threads have roles, each role runs by itself, and its waits
last until others act.
"""

import contextlib
import math
import threading

import numpy as np

from pallas_kernels import mosaic, mosaic_memory

SHARED, WARP = 1 << 18, 32


class Register:
    """Stands for `mosaic.Int`: uint32 or uint64, an element a thread."""

    def __init__(self, value):
        if isinstance(value, Register):
            value = value.value
        if isinstance(value, int):
            value = np.full(machine.threads, value & 0xFFFFFFFF, np.uint32)
        self.value = value

    def _other(self, other):
        if isinstance(other, int):
            bits = 8 * self.value.itemsize
            return self.value.dtype.type(other & ((1 << bits) - 1))
        assert other.value.dtype == self.value.dtype
        return other.value

    def __add__(self, other):
        return Register(self.value + self._other(other))

    def __sub__(self, other):
        return Register(self.value - self._other(other))

    def __mul__(self, other):
        return Register(self.value * self._other(other))

    def __floordiv__(self, other):
        return Register(self.value // self._other(other))

    def __mod__(self, other):
        return Register(self.value % self._other(other))

    def __and__(self, other):
        return Register(self.value & self._other(other))

    def __or__(self, other):
        return Register(self.value | self._other(other))

    def __xor__(self, other):
        return Register(self.value ^ self._other(other))

    def __lshift__(self, other):
        return Register(self.value << self._other(other))

    def __rshift__(self, other):
        return Register(self.value >> self._other(other))

    def __lt__(self, other):
        return self.value < self._other(other)

    def equals(self, other):
        return self.value == self._other(other)

    def at_most(self, other):
        return Register(np.minimum(self.value, self._other(other)))

    def wide(self):
        return Register(self.value.astype(np.uint64))

    def narrow(self):
        return Register((self.value & np.uint64(0xFFFFFFFF)).astype(np.uint32))


class Reference:
    """Bytes in shared memory (address below `SHARED`) or an array in global memory."""

    def __init__(self, address, shape, itemsize):
        self.address, self.shape, self.itemsize = address, shape, itemsize

    @property
    def size(self):
        return math.prod(self.shape) * self.itemsize


class Machine:
    """One block at a time, and the global memory."""

    def __init__(self, threads):
        self.threads, self.block, self.globals = threads, 0, []
        self.local, self.changed, self.patience = threading.local(), threading.Condition(), 0

    @property
    def mask(self) -> np.ndarray:
        """Which threads act, in the role at hand."""
        return self.local.mask

    @mask.setter
    def mask(self, mask):
        self.local.mask = mask

    def allocate_global(self, array) -> Reference:
        """Each array has 4 GB of addresses to itself, and ends with a granule of 16 bytes."""
        data = np.ascontiguousarray(array)
        padded = np.full(-(-data.nbytes // 16) * 16, 0xFF, np.uint8)
        padded[: data.nbytes] = data.reshape(-1).view(np.uint8)
        self.globals.append(padded)
        return Reference(len(self.globals) << 32, data.shape, data.itemsize)

    def start_block(self, block, scratch) -> dict:
        self.block, self.mask = block, np.ones(self.threads, bool)
        self.shared, self.barriers = np.full(SHARED, 0xFF, np.uint8), {}
        self.groups = [[]]  # of small asynchronous copies; the last is open
        references, place = {}, 1024  # address 0 is nobody's
        for name, ref in scratch.items():
            references[name] = Reference(place, ref.shape, np.dtype(ref.dtype).itemsize)
            place += -(-references[name].size // 1024) * 1024
        return references

    def run_roles(self, block) -> None:
        """Each in a thread of its own; an error in one ends the wait of the others."""
        errors = []

        def run(mask, body):
            self.mask = mask
            try:
                body()
            except BaseException as error:
                errors.append(error)
                self.patience = 0
                with self.changed:
                    self.changed.notify_all()

        self.patience = 60
        roles = [(mask, body) for mask, _, body in block.roles()]
        threads = [threading.Thread(target=run, args=role) for role in roles]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def memory(self, address) -> tuple[np.ndarray, int]:
        address = int(address)
        return (
            (self.globals[(address >> 32) - 1], address & 0xFFFFFFFF)
            if address >> 32
            else (
                self.shared,
                address,
            )
        )

    def active(self):
        return np.flatnonzero(self.mask)

    def load(self, address: Register, count: int) -> np.ndarray:
        """`count` bytes of each active thread, aligned to their number."""
        out = np.zeros((self.threads, count), np.uint8)
        places = address.value[self.mask].astype(np.uint64)
        assert (places % np.uint64(count) == 0).all()
        for space in np.unique(places >> np.uint64(32)):
            memory = self.globals[int(space) - 1] if space else self.shared
            here = np.zeros(self.threads, bool)
            here[self.active()[places >> np.uint64(32) == space]] = True
            offsets = address.value[here].astype(np.uint64) & np.uint64(0xFFFFFFFF)
            out[here] = memory[offsets[:, None] + np.arange(count, dtype=np.uint64)]
        return out

    def store(self, address, value) -> None:
        data = np.ascontiguousarray(value.value if isinstance(value, Register) else value)
        self.store_bytes(address, data.reshape(-1, 1).view(np.uint8))

    def store_bytes(self, address, data) -> None:
        """`data` [threads, bytes] of the active threads, aligned to their number."""
        for thread in self.active():
            memory, offset = self.memory(address.value[thread])
            assert offset % data.shape[1] == 0 and offset + data.shape[1] <= len(memory)
            memory[offset : offset + data.shape[1]] = data[thread]


class Phase:
    """An mbarrier."""

    def __init__(self, arrivals):
        self.arrivals = self.pending = arrivals
        self.bytes = self.completed = self.waited = 0
        self.copies = False

    def change(self, arrivals, size):
        self.pending -= arrivals
        self.bytes += size
        assert self.pending >= 0
        if self.pending == 0 and self.bytes == 0:
            self.completed, self.pending = self.completed + 1, self.arrivals

    def wait(self, parity) -> bool:
        """Whether the phase of this parity completes while other roles may still act."""

        def done():
            return self.completed % 2 != parity

        with machine.changed:
            machine.changed.wait_for(lambda: done() or not machine.patience, machine.patience)
        return done()


class Barriers:
    """Stands for `mosaic_memory.Barriers`."""

    def __init__(self, ref, count, first=None):
        first = Register(0) if first is None else first
        assert (first.value + count <= ref.size // 8).all()
        self.base, self.count = first * 8 + ref.address, count

    def initialize(self, arrivals, last=()):
        counts = [arrivals] * (self.count - len(last)) + list(last)
        for i, count in enumerate(counts):
            for thread in machine.active():
                address = int(self.base.value[thread]) + 8 * i
                assert address not in machine.barriers
                machine.barriers[address] = Phase(count)

    def address(self, slot):
        assert (slot.value[machine.mask] < self.count).all()
        return self.base + slot * 8

    def _change(self, slot, arrivals, sizes):
        address = self.address(slot)
        for thread in machine.active():
            size = int(sizes.value[thread]) if isinstance(sizes, Register) else sizes
            change(int(address.value[thread]), arrivals, size)

    def expect(self, slot, size):
        self._change(slot, 1, size)

    def arrive(self, slot):
        self._change(slot, 1, 0)

    def arrive_at(self, slot, rank):
        """The blocks of a cluster do the same: what one sends, it gets from the other."""
        self._change(slot, 1, 0)

    def reference(self, slot):
        return self, slot

    def wait(self, slot, parity):
        address = self.address(slot)
        for thread in machine.active():
            phase, odd = machine.barriers[int(address.value[thread])], parity.value[thread]
            assert phase.wait(odd), "waits for ever"
            phase.waited = phase.completed


def change(address, arrivals, size, copies=False):
    with machine.changed:
        phase = machine.barriers[address]
        phase.change(arrivals, size)
        phase.copies |= copies
        machine.changed.notify_all()


def copy_bulk(target, source, size, barrier):
    for thread in machine.active():
        memory, start = machine.memory(source.value[thread])
        place, count = int(target.value[thread]), int(size.value[thread])
        assert start % 16 == place % 16 == count % 16 == 0 and start + count <= len(memory)
        machine.shared[place : place + count] = memory[start : start + count]
        change(int(barrier.value[thread]), 0, -count, copies=True)


def copy_async(target, source, size, keep=True):
    assert keep or size == 16
    data = machine.load(source, size)
    poison = np.full((machine.threads, size), 0xFF, np.uint8)
    machine.store(target, poison.view(f"V{size}"))
    machine.groups[-1].append((target, data.view(f"V{size}"), machine.mask))


def commit_copies():
    machine.groups.append([])


def wait_copies(pending):
    """As for a thread: the groups are of all, and a thread has its own copies in each."""
    done = len(machine.groups) - 1 - pending
    outer = machine.mask
    for group in machine.groups[: max(0, done)]:
        for target, data, machine.mask in group:
            machine.store(target, data)
        group.clear()
    machine.mask = outer


def copy_tensor(_, source, target, place, shape, barrier, swizzle, shared=False):
    (reference, index), (barriers, slot) = target, barrier
    width = shape[1] * source.itemsize  # of a row of the box, in bytes
    assert swizzle == width in (32, 64, 128)
    array = machine.memory(source.address)[0][: source.size]
    array = array.reshape(*source.shape[:-1], source.shape[-1] * source.itemsize)
    assert array.shape[-1] % 16 == 0
    for thread in machine.active():
        *lead, row, column = (int(p.value[thread]) for p in place)
        plane, column = array[tuple(lead)], column * source.itemsize
        box = np.zeros((shape[0], width), np.uint8)
        part = plane[row : row + shape[0], column : column + width]
        box[: part.shape[0], : part.shape[1]] = part
        start = reference.address + int(index.value[thread]) * box.size
        assert start % 1024 == 0
        assert box.size == math.prod(reference.shape[1:]) * reference.itemsize
        # The hardware's rule: bits 4.. of an address are flipped by its bits 7...
        chunks = np.arange(box.size // 16)
        places = chunks ^ (chunks >> 3 & (width // 16 - 1))
        swizzled = np.empty((len(chunks), 16), np.uint8)
        swizzled[places] = box.reshape(-1, 16)
        machine.shared[start : start + box.size] = swizzled.reshape(-1)
        change(int(barriers.address(slot).value[thread]), 1, 0, copies=True)


@contextlib.contextmanager
def when(condition):
    outer = machine.mask
    machine.mask = outer & condition
    yield
    machine.mask = outer


def branch(condition, yes, no):
    with when(condition):
        yes()
    with when(~condition):
        no()


def loop(stop, carry, body):
    outer, carry = machine.mask, list(carry)
    for i in range(int(stop.value[outer].max(initial=0))):
        machine.mask = outer & (i < stop.value)
        new = body(Register(i), carry)
        carry = [np.where(machine.mask, b, a) for a, b in zip(carry, new)]
    machine.mask = outer
    return carry


def lookup_lane(value, lane):
    return value.reshape(-1, WARP)[np.arange(machine.threads) // WARP, lane.value]


def unpack(word, dtype):
    return word.value[:, None].view(np.dtype(dtype)).astype(np.float32)


def pack(pairs, dtype):
    return Register(pairs.astype(np.dtype(dtype)).view(np.uint32)[:, 0])


GROUP, QUAD = np.arange(WARP) // 4, np.arange(WARP) % 4


def left_operand(words, dtype):
    """[warps, 16, 16] from the fragments of an mma's left operand (PTX ISA, m16n8k16)."""
    out = np.empty((machine.threads // WARP, 16, 16), np.float32)
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
    right = np.empty((machine.threads // WARP, 16, 8), np.float32)
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
    data = machine.shared[place[..., None] + np.arange(2)]
    return data.view(np.dtype(dtype))[..., 0].astype(np.float32)


def matrices(row):
    """[warps, 4, 8, 8]: what lanes 8 i.. address as matrix i, a row each."""
    address = np.where(machine.mask, row.value, 1024).reshape(-1, 4, 8)
    assert (address % 16 == 0).all()
    return machine.shared[address[..., None] + np.arange(16)].view(np.uint16)


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
    for warp in np.flatnonzero(machine.mask[::WARP]):
        for i, word in enumerate(words):
            pairs = word.value.reshape(-1, WARP)[warp]
            matrix = np.empty((8, 8), np.uint16)  # [row of the fragment, column]
            matrix[GROUP, 2 * QUAD], matrix[GROUP, 2 * QUAD + 1] = pairs & 0xFFFF, pairs >> 16
            for line in range(8):
                start = int(address[warp, i, line])
                assert start % 16 == 0
                machine.shared[start : start + 16] = matrix[:, line].copy().view(np.uint8)


def permute(a, b, selector):
    both = (b.value.astype(np.uint64) << np.uint64(32)) | a.value
    out = np.zeros(machine.threads, np.uint32)
    for i in range(4):
        nibble = selector.value >> np.uint32(4 * i) & np.uint32(15)
        assert (nibble < 8).all()
        byte = both >> (nibble.astype(np.uint64) * np.uint64(8)) & np.uint64(255)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return Register(out)


def await_signal(address, tag):
    seen = machine.load(address, 8)[machine.mask].view(np.uint64)[:, 0]
    assert (seen == tag.value[machine.mask]).all(), "waits for a block that starts later"
    machine.store(address, np.zeros(machine.threads, np.uint64))


def float_of(data):
    return data.view(np.float32)[:, 0]


PRIMITIVES = {
    "Int": Register,
    "Barriers": Barriers,
    "thread_index": lambda: Register(np.arange(machine.threads, dtype=np.uint32)),
    "block_index": lambda: Register(machine.block),
    "cluster_rank": lambda: Register(machine.block % 2),
    "select": lambda c, yes, no: Register(np.where(c, yes.value, Register(no).value)),
    "select_float": lambda c, yes, no: np.where(c, yes, no),
    "both": lambda a, b: a & b,
    "when": when,
    "branch": branch,
    "loop": loop,
    "sync_block": lambda: None,
    "sync_cluster": lambda: None,
    "sync_warp": lambda: None,
    "uniform": lambda value: value,
    "shuffle": lookup_lane,
    "and_or": lambda a, b, c: (a & b) | c,
    "zero": lambda: np.zeros(machine.threads, np.float32),
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c,
    "mul_then_add": lambda a, b, c: a * b + c,
    "round_to": lambda value, dtype: value.astype(np.dtype(dtype)),
    "pack_pair": lambda low, high, dtype: pack(np.stack([low, high], -1), dtype),
    "mul_pairs": lambda a, b, dtype: pack(unpack(a, dtype) * unpack(b, dtype), dtype),
    "mma": mma,
    "wgmma_start": wgmma_start,
    "wgmma_finish": lambda acc, a: acc,
    "wgmma_wait": lambda pending, a: None,
    "permute": permute,
    "sync_threads": lambda barrier, count: None,
    "grid_tag": lambda: Register(np.full(machine.threads, 0xF00D << 32, np.uint64)),
    "signal": lambda address, tag: machine.store(address, tag),
    "await_signal": await_signal,
    "fence_proxy": lambda: None,
    "store_words": lambda address, words: machine.store_bytes(
        address, np.stack([word.value for word in words], -1).view(np.uint8)
    ),
    "store_floats": lambda address, values: machine.store_bytes(
        address, np.stack(values, -1).view(np.uint8)
    ),
    "load_matrices": load_matrices,
    "load_matrices_transposed": load_matrices_transposed,
    "store_matrices_transposed": store_matrices_transposed,
    "shared_address": lambda ref: Register(ref.address),
    "global_address": lambda ref: Register(np.full(machine.threads, ref.address, np.uint64)),
    "load_float": lambda address: float_of(machine.load(address, 4)),
    "prefetch": lambda address: machine.load(address, 1),
    "load_half": lambda address, dtype: (
        machine.load(address, 2).view(np.dtype(dtype))[:, 0].astype(np.float32)
    ),
    "load_word": lambda address: Register(machine.load(address, 4).view(np.uint32)[:, 0]),
    "load_byte": lambda address: Register(machine.load(address, 1)[:, 0].astype(np.uint32)),
    "load_words": lambda address: [
        Register(word) for word in machine.load(address, 16).view(np.uint32).T
    ],
    "load_floats": lambda address, count: (
        list(machine.load(address, 4 * count).view(np.float32).T)
        if count <= 4
        else PRIMITIVES["load_floats"](address, 4)
        + PRIMITIVES["load_floats"](address + 16, count - 4)
    ),
    "add_floats": lambda values, address: [
        a + b for a, b in zip(values, PRIMITIVES["load_floats"](address, 4))
    ],
    "store": lambda address, value: machine.store(address, value),
    "copy_bulk": copy_bulk,
    "copy_async": copy_async,
    "commit_copies": commit_copies,
    "wait_copies": wait_copies,
    "copy_tensor": copy_tensor,
    "element": lambda ref, i: (ref, i),
}

machine: Machine


def allocate(value):
    """A reference to an array, or a tuple of them."""
    return (
        tuple(map(allocate, value)) if isinstance(value, tuple) else machine.allocate_global(value)
    )


def simulate(monkeypatch, layout, tiles, blocks, threads, operands, out, make_block):
    """Run `make_block(references, out, scratch).run()` for each block; gives the output array."""
    global machine
    machine = Machine(threads)
    for name, value in PRIMITIVES.items():
        module = mosaic if hasattr(mosaic, name) else mosaic_memory
        monkeypatch.setattr(module, name, value)
    references = type(operands)(*map(allocate, operands))
    target = machine.allocate_global(out)
    with np.errstate(over="ignore", invalid="ignore"):
        for block in range(blocks):
            scratch = machine.start_block(block, layout.scratch(tiles))
            body = make_block(references, target, scratch)
            if hasattr(body, "roles"):
                body.setup()
                machine.run_roles(body)
            else:
                body.run()
                phases = [phase for phase in machine.barriers.values() if phase.copies]
                assert all(phase.waited == phase.completed for phase in phases)
    data = machine.memory(target.address)[0][: out.nbytes]
    return data.view(out.dtype).reshape(out.shape)
