"""Division of the matmul for many rows of x (`mosaic_large`): tiles, clusters and their shares.

Two blocks make a cluster: they have neighbouring outputs and the same rows of x. Clusters share the
work evenly, to two steps: a share may start or end inside a tile. The cluster with the start of a
tile adds the sums of the others. It waits only for clusters of lower block numbers, which the GPU
starts earlier.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_table as pair_table
from pallas_kernels.matmul.config_large import LargeTiles
from pallas_kernels.matmul.mosaic_left import OUTPUTS, STEP, TABLE, Columns, Rows
from pallas_kernels.matmul.problem import Problem

CLUSTER = 2  # blocks
MULTIPLIERS = 2  # warpgroups
MULTIPLYING = MULTIPLIERS * mg.WARPGROUP  # threads
ROW_GROUP = 8  # tiles of rows that take their turn at a tile of outputs together
LEAD = 4  # units; a tile's head waits for the rest, and has LEAD / shares more than an equal share


class Layout:
    """Sizes that follow from the problem and the tiles; the work and its division."""

    def __init__(self, problem: Problem, tiles: LargeTiles, transpose: bool, sms: int):
        self.problem, self.tiles = problem, tiles
        self.left = (Columns if transpose else Rows)(problem, tiles.rows)
        self.x_bytes = tiles.rows * 2 * STEP  # of x in a slot
        self.row_tiles = pl.cdiv(problem.m, tiles.rows)
        self.row_group = max(d for d in range(1, ROW_GROUP + 1) if self.row_tiles % d == 0)
        self.output_tiles = pl.cdiv(self.left.outputs, CLUSTER * OUTPUTS)  # of a cluster
        self.units = pl.cdiv(self.left.contracted, 2 * STEP)  # of a tile: two steps each
        tiles_total = self.output_tiles * self.row_tiles
        # Shares are counted in grains: units, or whole tiles.
        self.grain = 1 if tiles.split else self.units
        self.grains = tiles_total * (self.units // self.grain)
        self.clusters = min(sms // CLUSTER, self.grains, tiles_total * max(tiles.split, 1))
        shares, rest = divmod(self.clusters, tiles_total)
        self.shares = 1 if rest else max(1, shares)  # of each tile; 1 too where they are uneven
        tails = self.shares - 1  # a unit each at least
        self.head = min((self.units + LEAD) // self.shares, self.units - tails)
        self.splits = any(self.begin(c) % self.units for c in range(self.clusters))

    def begin(self, cluster):
        """The first unit of a cluster's share (of the end, for the number of clusters)."""
        if self.shares == 1:
            return cluster * self.grains // self.clusters * self.grain
        tile, share = cluster // self.shares, cluster % self.shares
        is_tail = (share + (self.shares - 1)) // self.shares  # 0 or 1
        tails = (share - is_tail) * (self.units - self.head) // (self.shares - 1)
        return tile * self.units + is_tail * self.head + tails

    def last_cluster(self, tile):
        """The cluster whose share has the last unit of a tile."""
        if self.shares > 1:
            return (tile + 1) * self.shares - 1
        return (((tile + 1) * self.units // self.grain) * self.clusters - 1) // self.grains

    def tile(self, tile):
        """The tile's place among a cluster's outputs and among rows of x."""
        span = self.row_group * self.output_tiles
        group, within = tile // span, tile % span
        return within // self.row_group, group * self.row_group + within % self.row_group

    def scratch(self, _=None) -> dict:
        """Shared memory of a block, by name."""
        slots, dtype = self.tiles.slots, jnp.dtype(self.problem.dtype)
        return {
            "x": plgpu.SMEM((slots, self.tiles.rows, STEP), dtype),
            "packed": plgpu.SMEM((slots, *self.left.box), jnp.uint8),
            "scales": plgpu.SMEM((slots * self.left.scale_words,), jnp.int32),
            "pairs": plgpu.SMEM((2 * pair_table.WORDS,), jnp.int32),
            "table": plgpu.SMEM((TABLE,), jnp.float32),
            "barriers": plgpu.SMEM((4 * slots,), jnp.int32),
        }


class Share:
    """A cluster's share of the work, in the registers of a thread; its steps count from 0."""

    def __init__(self, layout: Layout):
        self.layout, self.rank = layout, mg.cluster_rank()
        # Later numbers are for earlier work: the head of a tile waits for the clusters of its tail.
        self.cluster = mg.Int(layout.clusters - 1) - mg.block_index() // CLUSTER
        self.first, self.end = layout.begin(self.cluster), layout.begin(self.cluster + 1)
        self.steps = self.end - self.first << 1

    def place(self, p: mg.Int) -> tuple[mg.Int, mg.Int, mg.Int]:
        """First output, first row of x and step in its tile of step p."""
        place = (self.first << 1) + p
        steps = 2 * self.layout.units
        return *self.origin(place // steps), place % steps

    def origin(self, tile: mg.Int) -> tuple[mg.Int, mg.Int]:
        """This block's first output and first row of x of a tile."""
        output, row = self.layout.tile(tile)
        return (output * CLUSTER + self.rank) * OUTPUTS, row * self.layout.tiles.rows

    def tails(self) -> mg.Int:
        """How many later clusters have parts of the last tile, if this one has its first."""
        units = self.layout.units
        tile = (self.end - 1) // units
        begins, ends = self.first < tile * units + 1, (tile + 1) * units < self.end + 1
        count = self.layout.last_cluster(tile) - self.cluster
        return mg.select(begins, mg.select(ends, mg.Int(0), count), 0)
