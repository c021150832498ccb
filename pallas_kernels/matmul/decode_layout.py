"""Division of the matmul for few rows of x (`mosaic_decode`): slabs of K, tiles of weight rows."""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_table as pair_table
from pallas_kernels.matmul.config import PANEL, DecodeTiles
from pallas_kernels.matmul.mosaic_panels import ROWS, PanelLayout
from pallas_kernels.matmul.mosaic_slabs import SlabLayout
from pallas_kernels.matmul.mosaic_terms import TermLayout
from pallas_kernels.matmul.problem import Problem

COLUMN = ROWS + 4  # floats between columns of a partial result: no bank conflict when it is written


class Layout:
    """Sizes that follow from the problem and the tiles."""

    def __init__(self, problem: Problem, tiles: DecodeTiles, sms: int):
        self.m, self.columns = problem.m, -(-problem.m // 8)  # groups of 8 rows of x
        self.panels, self.slabs = -(-problem.k // PANEL), tiles.slabs
        slab_panels = -(-self.panels // self.slabs)  # of the largest slab
        self.steps = -(-slab_panels // tiles.warps)  # panels of a warp
        self.together = tiles.together and self.steps == 1
        self.tiles = -(-problem.n // ROWS)
        self.clusters = min(sms // self.slabs, self.tiles)
        # Whether to ask for x before packed bytes: these keep it waiting where there are many of
        # them, and wait for it where it is much (`benchmarks/NOTES.md`, step 13).
        self.x_first = self.steps == 1 and self.clusters < self.tiles
        self.panel = PanelLayout(problem, tiles.warps, tiles.stages)
        self.x_row = self.steps * tiles.warps * PANEL * 2 + 16  # bytes: rows in different banks
        self.slab = SlabLayout(problem.m, self.slabs)
        self.terms = TermLayout(problem, tiles)
        self.partial = 8 * self.columns * COLUMN  # floats of one warp

    def scratch(self, tiles: DecodeTiles) -> dict:
        """Shared memory of a block, by name."""
        x_size = self.m * self.x_row // 4 if tiles.shared_x else 1
        parts = self.panel.scratch(), self.terms.scratch(), self.panel.barriers()
        return {
            **{name: ref for part in parts for name, ref in part.items()},
            "x": plgpu.SMEM((x_size,), jnp.int32),
            "table": plgpu.SMEM((pair_table.WORDS,), jnp.int32),
            "partials": plgpu.SMEM((2 * tiles.warps * self.partial,), jnp.float32),
            **self.slab.scratch(),
        }


class Share:
    """A block's slab of K, and the tiles of its cluster; they count from 0."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.slab = mg.cluster_rank() if layout.slabs > 1 else mg.Int(0)
        self.cluster = mg.block_index() // layout.slabs
        self.tiles = (mg.Int(layout.tiles + layout.clusters - 1) - self.cluster) // layout.clusters
        self.first_panel = self.slab * layout.panels // layout.slabs
        self.panels = (self.slab + 1) * layout.panels // layout.slabs - self.first_panel

    def row(self, i: mg.Int) -> mg.Int:
        """The first weight row of tile i."""
        return (self.cluster + i * self.layout.clusters) * ROWS

    def owner(self, i: mg.Int) -> mg.Int:
        """The slab whose block writes tile i: each in turn."""
        return i % self.layout.slabs

    def owns(self, i: mg.Int) -> mg.Value:
        """Whether this block does."""
        return self.owner(i).equals(self.slab)
