"""How the work of `mosaic_mid` is divided, and what memory a block needs."""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_table as pair_table
from pallas_kernels.matmul.config import MOST_CLUSTER, PANEL, MidTiles
from pallas_kernels.matmul.mosaic_panels import PANEL_BYTES, ROWS, PanelLayout
from pallas_kernels.matmul.mosaic_x import XLayout
from pallas_kernels.matmul.problem import Problem

WARPS = 16
THREADS = WARPS * mg.WARP
SUMS = 16 * THREADS  # bytes of 4 sums of each thread: of a stripe
PACKED = WARPS * ROWS * PANEL_BYTES  # bytes of a stage of packed panels


class Layout:
    """Sizes that follow from the problem and the tiles; the work and its division.

    A stripe is 8 columns of the result for each team to finish. What teams exchange, and results on
    their way to y, take `staging` bytes of shared memory.
    """

    def __init__(self, problem: Problem, tiles: MidTiles):
        if tiles.teams not in (1, 2, 4):
            raise ValueError(f"MidTiles.teams is {tiles.teams}; it must be 1, 2 or 4")
        self.teams, self.rows = tiles.teams, tiles.rows
        self.team_warps = WARPS // tiles.teams
        self.parts = PANEL // tiles.x_depth  # of x in a panel
        self.row_tiles = math.ceil(problem.n / self.rows)
        self.panels = math.ceil(problem.k / PANEL)  # of a tile
        self.total = self.row_tiles * self.panels
        self.blocks = min(tiles.blocks, self.total)
        first = [self.begin(b) for b in range(self.blocks)]
        self.splits = any(panel % self.panels for panel in first)
        ends = [self.share_of((t + 1) * self.panels - 1) for t in range(self.row_tiles)]
        self.others = max(end - self.share_of(t * self.panels) for t, end in enumerate(ends))
        # A block with one part of one tile has by its end read what its rings hold.
        self.once = self.blocks % self.row_tiles == 0
        # 4 teams with several tiles never ended on the GPU (NOTES.md); one team was not tried.
        if self.teams != 2 and not self.once:
            raise ValueError(
                f"MidTiles.blocks is {self.blocks}; with {self.teams} teams it must be a multiple "
                f"of the {self.row_tiles} tiles"
            )
        self.cluster = self._cluster() if tiles.cluster else 1
        self.panel = PanelLayout(problem, WARPS, tiles.stages)
        self.x = XLayout(problem, self.teams, self.team_warps, tiles.x_stages, tiles.x_depth)
        self.columns = self.x.columns
        # With more sums in registers there is room for less of an operand.
        self.depth = 64 if self.columns <= 96 else 32  # k decoded and multiplied at once
        # An instruction more a lookup, where x leaves no room.
        crowded = self.teams == 4 and self.columns > 88
        self.pitch = pair_table.PITCH if crowded else pair_table.WIDE
        self.late = self._late(crowded)
        self.stripe = 8 * self.teams
        self.stripes = math.ceil(self.columns / self.stripe)
        self.together = min(max(1, 16 // self.stripes), self.others)  # sums loaded at once
        self.own_stripes = math.ceil(self.stripes / self.cluster)  # that a block finishes
        self.received = (self.cluster - 1) * self.own_stripes * SUMS  # bytes, from the others
        self.staged = "packed" if self.once else "staging"  # where
        self.staging = tiles.stages * PACKED if self.once else 2 * SUMS  # bytes

    def _late(self, crowded: bool) -> bool:
        """Whether the place of a part is refilled once the product of the next part runs.

        That product starts earlier so. But a team of several warpgroups would wait for its last one
        in the midst of decoding, and many small parts gain nothing (`benchmarks/NOTES.md`).
        """
        panels = math.ceil(self.total / (self.teams * self.blocks))  # of a team
        few = panels <= (3 if crowded else 1)
        return self.teams == 4 and (self.parts < 4 or few)

    def _cluster(self) -> int:
        """The blocks of a cluster."""
        count = self.blocks // self.row_tiles
        if not self.once or count > MOST_CLUSTER:
            raise ValueError(
                f"MidTiles.blocks is {self.blocks}; with cluster=True it must be a multiple, of at "
                f"most {MOST_CLUSTER}, of the {self.row_tiles} tiles"
            )
        return count

    def begin(self, share):
        """The first panel of a share of the work (of the end, for the number of blocks)."""
        return share * self.total // self.blocks

    def share_of(self, panel):
        """The share that has a panel."""
        return ((panel + 1) * self.blocks - 1) // self.total

    def scratch(self, _=None) -> dict:
        """Shared memory of a block, by name."""
        scratch = self.panel.scratch() | self.x.scratch(self.received)
        scratch["table"] = plgpu.SMEM((256 * self.pitch // 4,), jnp.int32)
        if not self.once:
            scratch["staging"] = plgpu.SMEM((self.staging // 4,), jnp.float32)
        if self.cluster > 1:
            scratch["received"] = plgpu.SMEM((2,), jnp.int32)  # a barrier
        return scratch

    def sums(self) -> list[jax.ShapeDtypeStruct]:
        """Device memory for the sums that a block leaves to another, and their marks."""
        if not self.splits or self.cluster > 1:
            return []
        return [
            jax.ShapeDtypeStruct((self.blocks, self.stripes * SUMS // 4), jnp.float32),
            jax.ShapeDtypeStruct((self.blocks, WARPS, 2), jnp.int32),
        ]
