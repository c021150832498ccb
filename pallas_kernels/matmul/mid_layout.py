"""How the work of `mosaic_mid` is divided, and what memory a block needs."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_table as pair_table
from pallas_kernels.matmul.config import MID_ROWS as ROWS
from pallas_kernels.matmul.config import PANEL, MidTiles
from pallas_kernels.matmul.mosaic_panels import PanelLayout
from pallas_kernels.matmul.mosaic_x import TEAM, XLayout
from pallas_kernels.matmul.problem import Problem

TEAMS = 2
WARPS = TEAMS * TEAM
THREADS = WARPS * mg.WARP
PAIR = 16  # columns: 8 that one team finishes, 8 that the other does
PAIR_BYTES = 16 * THREADS  # of their sums: 4 floats a thread


class Layout:
    """Sizes that follow from the problem and the tiles; the work and its division."""

    def __init__(self, problem: Problem, tiles: MidTiles):
        self.panel = PanelLayout(problem, WARPS, tiles.stages)
        self.x = XLayout(problem, TEAMS, tiles.x_stages, tiles.x_depth)
        self.columns = self.x.columns
        # With more sums in registers there is room for less of an operand.
        self.depth = 64 if self.columns <= 96 else 32  # k decoded and multiplied at once
        self.parts = PANEL // tiles.x_depth  # of x in a panel
        self.row_tiles = -(-problem.n // ROWS)
        self.panels = -(-problem.k // PANEL)  # of a tile
        self.total = self.row_tiles * self.panels
        self.blocks = min(tiles.blocks, self.total)
        first = [self.begin(b) for b in range(self.blocks)]
        self.splits = any(panel % self.panels for panel in first)
        ends = [self.share_of((t + 1) * self.panels - 1) for t in range(self.row_tiles)]
        self.others = max(end - self.share_of(t * self.panels) for t, end in enumerate(ends))
        self.pairs = -(-self.columns // PAIR)
        self.pairs_at_once = min(self.pairs, 2)
        self.together = min(max(1, 16 // self.pairs), self.others)  # sums loaded at once

    def begin(self, share):
        """The first panel of a share of the work (of the end, for the number of blocks)."""
        return share * self.total // self.blocks

    def share_of(self, panel):
        """The share that has a panel."""
        return ((panel + 1) * self.blocks - 1) // self.total

    def scratch(self, _=None) -> dict:
        """Shared memory of a block, by name."""
        return (
            self.panel.scratch()
            | self.x.scratch()
            | {
                "table": plgpu.SMEM((2 * pair_table.WORDS,), jnp.int32),
                "staging": plgpu.SMEM((self.pairs_at_once * PAIR_BYTES // 4,), jnp.float32),
            }
        )

    def sums(self) -> list[jax.ShapeDtypeStruct]:
        """Device memory for the sums that a block leaves to another, and their marks."""
        if not self.splits:
            return []
        size = self.pairs * PAIR_BYTES // 4
        return [
            jax.ShapeDtypeStruct((self.blocks, size), jnp.float32),
            jax.ShapeDtypeStruct((self.blocks, WARPS, 2), jnp.int32),
        ]
