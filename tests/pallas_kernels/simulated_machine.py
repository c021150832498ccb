"""The machine of `block_simulator`: registers, memory, barriers and copies, in numpy.

A register is an array with an element a thread. A copy happens at once, but a small asynchronous
one when it is waited for. Barriers count arrivals and bytes; a wait for a phase that is not
complete is an error, as is an access out of bounds. Memory starts as NaN. The blocks of a cluster
run at a time, each in a thread of its own; to send to one that has ended is an error.
"""

import functools
import math
import threading

import numpy as np

SHARED = 1 << 18


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


class Reference:
    """Bytes in shared memory (address below `SHARED`) or an array in global memory."""

    def __init__(self, address, shape, itemsize):
        self.address, self.shape, self.itemsize = address, shape, itemsize

    @property
    def size(self):
        return math.prod(self.shape) * self.itemsize


class Block:
    """What a block has to itself."""

    def __init__(self, number):
        self.number, self.ended = number, False
        self.shared, self.barriers = np.full(SHARED, 0xFF, np.uint8), {}
        self.groups = [[]]  # of small asynchronous copies; the last is open


class Machine:
    """The blocks that run, and the global memory."""

    def __init__(self, threads, cluster=1):
        self.threads, self.globals = threads, []
        self.local, self.changed, self.patience = threading.local(), threading.Condition(), 0
        self.cluster: list = [None] * cluster
        self.met = threading.Barrier(cluster)

    @property
    def here(self) -> Block:
        """The block that this Python thread runs."""
        return self.local.block

    @property
    def block(self) -> int:
        """Its number."""
        return self.here.number

    @property
    def shared(self) -> np.ndarray:
        """Its shared memory."""
        return self.here.shared

    @property
    def barriers(self) -> dict:
        """Its barriers, by address."""
        return self.here.barriers

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
        self.local.block, self.mask = Block(block), np.ones(self.threads, bool)
        self.cluster[block % len(self.cluster)] = self.here
        references, place = {}, 1024  # address 0 is nobody's
        for name, ref in scratch.items():
            references[name] = Reference(place, ref.shape, np.dtype(ref.dtype).itemsize)
            place += -(-references[name].size // 1024) * 1024
        return references

    def run_roles(self, block) -> None:
        """Side by side."""
        here = self.here

        def run(mask, body):
            self.local.block, self.mask = here, mask
            body()

        self.run_all([functools.partial(run, mask, body) for mask, _, body in block.roles()])

    def run_all(self, bodies) -> None:
        """Each in a thread of its own; an error in one ends the wait of the others."""
        errors = []

        def run(body):
            try:
                body()
            except BaseException as error:
                errors.append(error)
                self.patience = 0
                self.met.abort()
                with self.changed:
                    self.changed.notify_all()

        self.patience = 60
        threads = [threading.Thread(target=run, args=(body,)) for body in bodies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            self.met.reset()
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


def change(address, arrivals, size, copies=False, block=None):
    with machine.changed:
        phase = (block or machine.here).barriers[address]
        phase.change(arrivals, size)
        phase.copies |= copies
        machine.changed.notify_all()


REMOTE = 24  # a remote address has the block's rank, from 1 on, from this bit on


def remote_address(address, rank):
    return address + (rank + 1 << REMOTE)


def send(address, values, barrier):
    data = np.stack(values, -1).astype(np.float32).view(np.uint8)
    for thread in machine.active():
        places = (int(a.value[thread]) for a in (address, barrier))
        (rank, place), (owner, phase) = (divmod(a, 1 << REMOTE) for a in places)
        block = machine.cluster[rank - 1]
        assert rank == owner and not block.ended and place % data.shape[1] == 0
        block.shared[place : place + data.shape[1]] = data[thread]
        change(phase, 0, -data.shape[1], copies=True, block=block)


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
    machine.here.groups[-1].append((target, data.view(f"V{size}"), machine.mask))


def commit_copies():
    machine.here.groups.append([])


def wait_copies(pending):
    """As for a thread: the groups are of all, and a thread has its own copies in each."""
    done = len(machine.here.groups) - 1 - pending
    outer = machine.mask
    for group in machine.here.groups[: max(0, done)]:
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


machine: Machine


def start(threads, cluster=1) -> Machine:
    """A new machine, with blocks of so many threads in clusters of so many blocks."""
    global machine
    machine = Machine(threads, cluster)
    return machine
