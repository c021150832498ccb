"""Packed weights inside a Mosaic kernel: each warp copies its own through a ring in shared memory.

A panel is 256 k of 16 weight rows, the share of a warp, with its block scales. A warp starts as
soon as its own bytes have come, whatever the others do. Packed bytes come by the tensor copies of
one thread, or by small asynchronous copies of all lanes, as the scales do: `benchmarks/NOTES.md`
has which is faster where.
"""

import dataclasses

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels.matmul.config import PANEL
from pallas_kernels.matmul.mosaic_warp_scales import TABLE_BYTES, ScaleLayout, WarpScales
from pallas_kernels.matmul.problem import Operands, Problem

ROWS = 16  # of the m of an mma
CHUNK = 32  # k of 16 packed bytes: two mma steps
CHUNKS = PANEL // CHUNK
PANEL_BYTES = PANEL // 2
SWIZZLE = 128  # of packed rows: 16-byte chunk c of row r lies at c ^ (r & 7)


@dataclasses.dataclass(frozen=True)
class PanelLayout:
    """Shared memory of the rings of all warps, `depth` panels each."""

    problem: Problem
    warps: int
    depth: int

    @property
    def scales(self) -> ScaleLayout:
        """Of a panel."""
        return ScaleLayout(self.problem, PANEL)

    def scratch(self) -> dict:
        """What to allocate, by name."""
        panels = self.warps * self.depth
        scratch = {
            "packed": plgpu.SMEM((panels, ROWS, PANEL_BYTES), jnp.uint8),
            "scales": plgpu.SMEM((panels * self.scales.size // 4,), jnp.int32),
        }
        if self.problem.double:
            decoded = self.warps * self.scales.decoded // 4
            scratch["decoded"] = plgpu.SMEM((decoded,), jnp.float32)
            scratch["scale_table"] = plgpu.SMEM((TABLE_BYTES // 4,), jnp.float32)
        return scratch

    def barriers(self) -> dict:
        """What `TensorPanels` needs besides."""
        return {"barriers": plgpu.SMEM((2 * self.warps * self.depth,), jnp.int32)}


class PanelRing:
    """One thread's view of its warp's ring; a subclass copies the packed bytes.

    For each panel in turn: `start`; after those of `depth` - 1 more panels, and when it has come,
    `words` and `scales.read`, before the next `start` in its place. All of a warp call all of them.
    """

    def __init__(self, layout: PanelLayout, refs: Operands, scratch: dict):
        self.layout, self.problem = layout, layout.problem
        self.source, self.packed = refs.packed, scratch["packed"]
        self.layer = mg.Int(0)
        if self.problem.stacked:
            self.layer = mem.load_word(mem.global_address(refs.layer))
        warp, self.lane = mg.warp_and_lane(mg.thread_index())
        self.warp = mg.uniform(warp)
        self.first = self.warp * layout.depth  # of the warp's places among those of all
        self.scales = WarpScales(layout.scales, list(refs.scales), self.layer)
        address = {name: mem.shared_address(ref) for name, ref in scratch.items()}
        self.base = address["packed"]
        ring = address["scales"] + self.first * layout.scales.size
        shared = []
        if self.problem.double:
            decoded = address["decoded"] + self.warp * layout.scales.decoded
            shared = [decoded, address["scale_table"]]
        self.scales.place(ring, layout.depth, *shared)

    def first_scale(self, panel: mg.Int) -> mg.Int:
        """The first scale of a panel in a row."""
        return panel * PANEL // self.problem.block_size

    def words(self, slot: mg.Int, first: int, count: int) -> list[tuple[mg.Int, mg.Int]]:
        """This lane's words of chunks from `first` on: of mma rows lane // 4 and that + 8.

        Two chunks at a time, from even ones on: lanes address 16 rows of one, then of the other.
        """
        row, odd = self.lane & 15, self.lane >> 4
        lane = (row << 7) + (((row & 7) ^ odd) << 4)
        words = []
        for chunk in range(first, first + count, 2):
            four = mem.load_matrices(self.place(slot) + (lane ^ (chunk << 4)))
            words += [(four[0], four[1]), (four[2], four[3])]
        return words

    def chunk(self, slot: mg.Int, chunk: int) -> list[list[mg.Int]]:
        """All 4 words of a chunk in each of the mma rows of this lane, lane // 4 and that + 8."""
        row = self.lane >> 2
        start = self.place(slot) + (row << 7) + ((row ^ chunk) << 4)
        return [mem.load_words(start), mem.load_words(start + 8 * PANEL_BYTES)]

    def place(self, slot: mg.Int) -> mg.Int:
        """Where the packed bytes of a panel are."""
        return self.base + (self.first + slot) * (ROWS * PANEL_BYTES)


class TensorPanels(PanelRing):
    """Packed bytes by a tensor copy of one thread, which a barrier counts."""

    def __init__(self, context, layout: PanelLayout, refs: Operands, scratch: dict):
        super().__init__(layout, refs, scratch)
        self.context = context
        self.barriers = mem.Barriers(scratch["barriers"], layout.depth, self.first)

    def initialize(self) -> None:
        """Make the warp's barriers."""
        with mg.when(self.lane.equals(0)):
            self.barriers.initialize(1)
        mg.sync_warp()

    def start(self, slot, row: mg.Int, panel: mg.Int, exists: mg.Value, last: mg.Int) -> None:
        """Start to copy a panel; after panel `last` no packed bytes, and any scales."""
        with mg.when(exists):
            self.scales.start(slot, row, self.first_scale(panel.at_most(last)))
        self.scales.commit()
        first_lane = mg.both(exists, self.lane.equals(0))
        with mg.when(mg.both(first_lane, panel < last + 1)):
            start = [self.layer] if self.problem.stacked else []
            start += [row, panel * PANEL_BYTES]
            target = mem.element(self.packed, self.first + slot)
            box = start, (ROWS, PANEL_BYTES), self.barriers.reference(slot), SWIZZLE
            mem.copy_tensor(self.context, self.source, target, *box)
        with mg.when(mg.both(first_lane, last < panel)):
            self.barriers.arrive(slot)

    def wait(self, slot: mg.Int, parity: mg.Int) -> None:
        """Wait for the packed bytes of a panel."""
        self.barriers.wait(slot, parity)


class LanePanels(PanelRing):
    """Packed bytes by asynchronous copies of all lanes; `scales.load` waits for them too."""

    def start(self, slot, row: mg.Int, panel: mg.Int, exists: mg.Value) -> None:
        """Start to copy a panel and its scales."""
        with mg.when(exists):
            self.scales.start(slot, row, self.first_scale(panel))
            self._copy(slot, row, panel)
        self.scales.commit()

    def _copy(self, slot: mg.Int, row: mg.Int, panel: mg.Int) -> None:
        """16 bytes a lane: 4 rows of 8 chunks at a time."""
        rows, pitch = self.problem.n, self.problem.k // 2
        source = mem.global_address(self.source) + self.layer.wide() * (rows * pitch)
        chunk = self.lane & 7
        # Past the last row or the end of K any bytes will do: nobody stores those, and x is 0.
        column = (panel * PANEL_BYTES + (chunk << 4)).at_most(pitch - 16)
        for first in range(0, ROWS, 4):
            tile_row = (self.lane >> 3) + first
            target = self.place(slot) + (tile_row << 7) + ((chunk ^ (tile_row & 7)) << 4)
            start = (row + tile_row).at_most(rows - 1).wide() * pitch + column.wide()
            mem.copy_async(target, source + start, 16, keep=False)
