"""Sums of the slabs of `mosaic_decode`, which are the blocks of a cluster.

Each tile of y has an owner among them, in turn. All send it their sums of the tile, itself
included, to one of a few slots, and it adds them, in the order of K, a tile later: by then they are
there. A sum for a slot comes after that slot was read: who sends for tile i has added up its own
last tile, i - 1 - slabs at the earliest, so the owner has sent for that one, after a barrier that
came after it had added up the tile i - 3 - slabs. No block ends before it has got all that it is
sent.
"""

import dataclasses

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels.matmul.mosaic_panels import ROWS

SLOTS = 3  # slabs * SLOTS >= slabs + 3


@dataclasses.dataclass(frozen=True)
class SlabLayout:
    """Shared memory of a block that is sent the sums of `slabs` slabs, for `m` rows of x."""

    m: int
    slabs: int

    @property
    def floats(self) -> int:
        """Of the sums of a slab."""
        return ROWS * self.m

    def scratch(self) -> dict:
        """What to allocate, by name."""
        if self.slabs == 1:
            return {}
        return {
            "slab_sums": plgpu.SMEM((SLOTS * self.slabs * self.floats,), jnp.float32),
            "slab_barriers": plgpu.SMEM((2 * SLOTS,), jnp.int32),
        }


class SlabSums:
    """One thread's view of them."""

    def __init__(self, layout: SlabLayout, slab: mg.Int, scratch: dict):
        self.layout, self.slab = layout, slab
        self.base = mem.shared_address(scratch["slab_sums"])
        self.barriers = mem.Barriers(scratch["slab_barriers"], SLOTS)

    def initialize(self) -> None:
        """By one thread; then the cluster meets."""
        self.barriers.initialize(1)

    def expect(self, i: mg.Int) -> None:
        """By one thread of the owner: let the barrier wait for the sums of tile i."""
        size = 4 * self.layout.floats * self.layout.slabs
        self.barriers.expect(self._slot(i), mg.Int(size))

    def send(self, i: mg.Int, index: mg.Int, value: mg.Value, owner: mg.Int) -> None:
        """Send the sum of this slab that is element `index` of tile i."""
        place = self._place(i, self.slab * self.layout.floats + index)
        barrier = self.barriers.address(self._slot(i))
        there, at = (mem.remote_address(address, owner) for address in (place, barrier))
        mem.send(there, [value], at)

    def wait(self, i: mg.Int) -> None:
        """By the owner: wait for the sums of tile i."""
        self.barriers.wait(self._slot(i), i // (self.layout.slabs * SLOTS) & 1)

    def load(self, i: mg.Int, index: mg.Int) -> list:
        """The sums that are element `index` of tile i, in the order of K."""
        floats = self.layout.floats
        places = (self._place(i, index + slab * floats) for slab in range(self.layout.slabs))
        return [mem.load_float(place) for place in places]

    def _slot(self, i: mg.Int) -> mg.Int:
        return i // self.layout.slabs % SLOTS

    def _place(self, i: mg.Int, element: mg.Int) -> mg.Int:
        slot = self._slot(i) * (self.layout.slabs * self.layout.floats)
        return self.base + (slot + element << 2)
