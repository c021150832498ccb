"""Sums of tiles that clusters of `mosaic_large` share evenly, exchanged part by part.

Each cluster of a tile finishes a part of its rows of x: it leaves the other parts of its sum in
device memory, flags them, and adds to its own part what the others left. They wait for each other:
a GPU that starts blocks in the order of their numbers has at most one tile, of a kernel, some of
whose clusters wait for others that have not started.
"""

from jax.extend.mlir import ir

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels.matmul.large_layout import CLUSTER, MULTIPLIERS, MULTIPLYING, Layout, Share
from pallas_kernels.matmul.mosaic_left import Lane

FLAG = 8  # bytes


def shapes(layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the sums, float32, and of the flags, two words each; neither is cleared before a call."""
    sums = (layout.clusters, CLUSTER, layout.tiles.rows // 2, MULTIPLYING)
    return sums, (layout.clusters, CLUSTER, MULTIPLIERS, layout.shares, 2)


class Exchange:
    """One multiplying thread's view of it."""

    def __init__(self, layout: Layout, share: Share, at: Lane, sums, flags):
        self.shares, self.at, self.sum_floats = layout.shares, at, layout.tiles.rows // 2
        self.own = share.cluster % self.shares  # the part that this cluster finishes
        self.first_row = self.own * (layout.tiles.rows // self.shares)
        self.block, self.tag = share.cluster * CLUSTER + share.rank, mem.grid_tag()
        self.sums = mem.global_address(sums) + (at.thread << 4).wide()
        self.flags = mem.global_address(flags)

    def part(self, acc: list[ir.Value]) -> list[ir.Value]:
        """The whole sum of the own part."""
        size = len(acc) // self.shares
        parts = [acc[start : start + size] for start in range(0, len(acc), size)]
        for i, values in enumerate(parts):
            with mg.when(mg.Int(0) < self.own ^ i):
                place = self._place(mg.Int(0), size * i)
                for j in range(0, size, 4):
                    mem.store_floats(place + 4 * MULTIPLYING * j, values[j : j + 4])
        self._meet()
        out = parts[0]
        for i, values in enumerate(parts[1:], 1):
            is_own = self.own.equals(i)
            out = [mg.select_float(is_own, v, o) for v, o in zip(values, out, strict=True)]
        others = [self._load(i, size) for i in range(1, self.shares)]
        for values in others:
            out = [mg.add(o, v) for o, v in zip(out, values, strict=True)]
        return out

    def _meet(self) -> None:
        """Tell the others that this warpgroup's parts for them are there, and wait for theirs."""
        mg.sync_threads(self.at.warpgroup + 1, mg.WARPGROUP)
        other = self.at.thread & (mg.WARPGROUP - 1)  # which of them, from this one on
        with mg.when(mg.both(mg.Int(0) < other, other < self.shares)):
            mem.signal(self._flag(other, self.own), self.tag)
            mem.await_signal(self._flag(mg.Int(0), self.own ^ other), self.tag)
        mg.sync_threads(self.at.warpgroup + 1, mg.WARPGROUP)

    def _of(self, other: mg.Int) -> mg.Int:
        """The block of this rank in the cluster whose part differs in these bits."""
        return self.block + ((self.own ^ other) - self.own) * CLUSTER

    def _flag(self, other: mg.Int, sender: mg.Int) -> mg.Int:
        """Where that block learns of what the sender left for it."""
        flag = (self._of(other) * MULTIPLIERS + self.at.warpgroup) * self.shares + sender
        return self.flags + (flag * FLAG).wide()

    def _place(self, other: mg.Int, first: mg.Int | int) -> mg.Int:
        """Where that block leaves its sum, from a float on."""
        return self.sums + ((self._of(other) * self.sum_floats + first) * (4 * MULTIPLYING)).wide()

    def _load(self, other: int, size: int) -> list[ir.Value]:
        """What that block left of the own part."""
        place = self._place(mg.Int(other), self.own * size)
        floats = (mem.load_floats(place + 4 * MULTIPLYING * j, 4) for j in range(0, size, 4))
        return [value for four in floats for value in four]
