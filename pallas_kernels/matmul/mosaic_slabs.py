"""Sums of the slabs of `mosaic_decode`, which are the blocks of a cluster.

Each tile of y has an owner among them, in turn. All send it their sums of the tile, itself
included, to one of a few slots, and it adds them, in the order of K, a tile later: by then they are
there. A sum for a slot comes after that slot was read: who sends for tile i has added up its own
last tile, i - 1 - slabs at the earliest, so the owner has sent for that one, after a barrier that
came after it had added up the tile i - 3 - slabs.
"""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels.matmul.mosaic_panels import ROWS

SLOTS = 3  # slabs * SLOTS >= slabs + 3


class SlabSums:
    """One thread's view of what its block is sent."""

    def __init__(self, m: int, slabs: int, scratch: dict):
        self.slabs, self.floats = slabs, ROWS * m  # of a tile
        self.rank = mg.cluster_rank()
        self.base = mem.shared_address(scratch["slab_sums"])
        self.barriers = mem.Barriers(scratch["slab_barriers"], SLOTS)

    @staticmethod
    def scratch(m: int, slabs: int) -> dict:
        """Shared memory of a block, by name."""
        return {
            "slab_sums": plgpu.SMEM((SLOTS * slabs * ROWS * m,), jnp.float32),
            "slab_barriers": plgpu.SMEM((2 * SLOTS,), jnp.int32),
        }

    def initialize(self) -> None:
        """By one thread; then the cluster meets."""
        self.barriers.initialize(1)

    def owner(self, i: mg.Int) -> mg.Int:
        """The rank of the block that adds up tile i."""
        return i % self.slabs

    def expect(self, i: mg.Int) -> None:
        """By one thread of the owner: let the barrier wait for the sums of tile i."""
        size = 4 * self.floats * self.slabs
        self.barriers.expect(self.slot(i), mg.Int(size))

    def send(self, i: mg.Int, index: mg.Int, value) -> None:
        """Send the sum of this slab that is element `index` of tile i."""
        own = self.place(i, self.rank * self.floats + index)
        remote = (mem.remote_address(a, self.owner(i)) for a in (own, self.barrier(i)))
        address, barrier = remote
        mem.send(address, [value], barrier)

    def wait(self, i: mg.Int) -> None:
        """By the owner: wait for the sums of tile i."""
        turn = i // (self.slabs * SLOTS)
        self.barriers.wait(self.slot(i), turn & 1)

    def load(self, i: mg.Int, index: mg.Int) -> list:
        """The sums that are element `index` of tile i, in the order of K."""
        return [
            mem.load_float(self.place(i, index + slab * self.floats)) for slab in range(self.slabs)
        ]

    def slot(self, i: mg.Int) -> mg.Int:
        return i // self.slabs % SLOTS

    def barrier(self, i: mg.Int) -> mg.Int:
        return self.barriers.address(self.slot(i))

    def place(self, i: mg.Int, element: mg.Int) -> mg.Int:
        return self.base + ((self.slot(i) * (self.slabs * self.floats) + element) << 2)
