"""The ring of shared-memory slots of `mosaic_large`, by the steps of a block's share.

Step p is in slot p modulo their number. The copier's warps and its copies fill a slot; the
multipliers of both blocks of the cluster leave it, as each block's copier fills a part of both.
"""

from jax.extend.mlir import ir

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels.matmul.large_layout import CLUSTER, MULTIPLYING

COPIES = 2  # of a step: x and packed bytes, each with an arrival of its own


class Ring:
    """One thread's view of the slots."""

    def __init__(self, barriers: ir.Value, slots: int):
        self.slots = slots
        self.barriers = mem.Barriers(barriers, 2 * slots)  # for full slots, then for free ones
        self.lane = mg.thread_index() & 31

    def initialize(self) -> None:
        """By one thread."""
        warps = mg.WARPGROUP // mg.WARP
        free = [CLUSTER * MULTIPLYING // mg.WARP] * self.slots
        self.barriers.initialize(warps + COPIES, free)

    def wait_free(self, p: mg.Int) -> None:
        """By the copier: wait until step p can be filled."""
        self.barriers.wait(p % self.slots + self.slots, p // self.slots + 1 & 1)

    def fill(self, p: mg.Int) -> None:
        """By a warp of the copier: what it writes for step p is written."""
        mg.sync_warp()
        with mg.when(self.lane.equals(0)):
            self.barriers.arrive(p % self.slots)

    def wait_full(self, p: mg.Int) -> None:
        """By a multiplier: wait until step p is there."""
        self.barriers.wait(p % self.slots, p // self.slots & 1)

    def release(self, p: mg.Int) -> None:
        """By a multiplying warp: leave step p, in both blocks."""
        with mg.when(self.lane < CLUSTER):
            self.barriers.arrive_at(p % self.slots + self.slots, self.lane)
