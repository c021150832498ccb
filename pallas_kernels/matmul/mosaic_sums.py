"""Sums of tiles that clusters of `mosaic_large` share unevenly, through device memory.

A cluster leaves the sum of a tile's tail there, and flags it. The copier of the cluster that has
the tile's head brings each sum through the ring of slots, as `PARTS` more steps, while the last
products run; the multipliers add it in the order of the clusters. It waits only for clusters of
lower block numbers, which the GPU starts earlier.
"""

from jax.extend.mlir import ir

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels.matmul.large_layout import CLUSTER, MULTIPLIERS, MULTIPLYING, Layout, Share
from pallas_kernels.matmul.mosaic_ring import COPIES, Ring

PARTS = 4  # of a sum, each as large as a slot's part of x


def shapes(layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the sums, float32, and of the flags, two words each; neither is cleared before a call."""
    sums = (layout.clusters, CLUSTER, layout.tiles.rows // 2, MULTIPLYING)
    return sums, (layout.clusters, CLUSTER, MULTIPLIERS, 2)


class Sums:
    """One thread's view of them."""

    def __init__(self, layout: Layout, share: Share, ring: Ring, x: mg.Int, sums, flags):
        self.share, self.ring, self.x, self.part_bytes = share, ring, x, layout.x_bytes
        self.sums, self.flags = mem.global_address(sums), mem.global_address(flags)
        self.thread, self.tag = mg.thread_index(), mem.grid_tag()

    def _of(self, cluster: mg.Int) -> tuple[mg.Int, mg.Int]:
        """Where the blocks of this rank find a cluster's sum, and its flags."""
        block = cluster * CLUSTER + self.share.rank
        flags = self.flags + (block * (8 * MULTIPLIERS)).wide()
        return self.sums + block.wide() * (PARTS * self.part_bytes), flags

    def write(self, acc: list[ir.Value], warpgroup: mg.Int) -> None:
        """By a multiplying warpgroup: leave the sum of a tile's tail."""
        target, flags = self._of(self.share.cluster)
        target = target + (self.thread << 4).wide()
        for i in range(0, len(acc), 4):
            mem.store_floats(target + 4 * MULTIPLYING * i, acc[i : i + 4])
        mg.sync_threads(warpgroup + 1, mg.WARPGROUP)
        with mg.when((self.thread & (mg.WARPGROUP - 1)).equals(0)):
            mem.signal(flags + (warpgroup << 3).wide(), self.tag)

    def copy(self) -> None:
        """By the copier: bring the sums of the share's last tile."""
        mg.loop(self.share.tails() * PARTS, [], lambda i, _: self._copy_part(i) or [])

    def _copy_part(self, i: mg.Int) -> None:
        p = self.share.steps + i
        slot, part = p % self.ring.slots, i % PARTS
        self.ring.wait_free(p)
        with mg.when((self.thread & (mg.WARPGROUP - 1)).equals(0)):
            source, flags = self._of(self.share.cluster + 1 + i // PARTS)
            with mg.when(part.equals(0)):
                for warpgroup in range(MULTIPLIERS):
                    mem.await_signal(flags + 8 * warpgroup, self.tag)
                mem.fence_proxy()
            barriers, size = self.ring.barriers, mg.Int(self.part_bytes)
            for _ in range(COPIES - 1):  # those of a step that a part has not
                barriers.arrive(slot)
            barriers.expect(slot, size)
            source = source + (part * size).wide()
            mem.copy_bulk(self.x + slot * size, source, size, barriers.address(slot))
        self.ring.fill(p)

    def add(self, acc: list[ir.Value], i: mg.Int) -> list[ir.Value]:
        """By a multiplier: add the i-th sum."""
        out, each = [], len(acc) // PARTS
        for part in range(PARTS):
            p = self.share.steps + i * PARTS + part
            self.ring.wait_full(p)
            source = self.x + p % self.ring.slots * self.part_bytes + (self.thread << 4)
            for j in range(0, each, 4):
                first = part * each + j
                out += mem.add_floats(acc[first : first + 4], source + 4 * MULTIPLYING * j)
            self.ring.release(p)
        return out
