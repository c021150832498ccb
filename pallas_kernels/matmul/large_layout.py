"""Division of the matmul for many rows of x (`mosaic_large`): tiles, clusters and their shares.

Two blocks make a cluster: they have neighbouring outputs and the same rows of x. Clusters share the
work in one of three ways (`LargeTiles.split`): whole tiles, in rounds; evenly, to two steps, so
that a share may start or end inside a tile; or so many clusters for each tile.

Each round of whole tiles is of neighbours, which have x and weights in common, and all clusters are
at one place of the contraction: the L2 cache serves them together.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_table as pair_table
from pallas_kernels.matmul.config_large import CLUSTER, ROW_GROUP, LargeTiles, divide
from pallas_kernels.matmul.mosaic_left import OUTPUTS, STEP, TABLE, Columns, Rows
from pallas_kernels.matmul.problem import Problem

MULTIPLIERS = 2  # warpgroups
MULTIPLYING = MULTIPLIERS * mg.WARPGROUP  # threads


class Layout:
    """Sizes that follow from the problem and the tiles; the work and its division."""

    def __init__(self, problem: Problem, tiles: LargeTiles, transpose: bool, sms: int):
        self.problem, self.tiles = problem, tiles
        self.left = (Columns if transpose else Rows)(problem)
        self.x_bytes = tiles.rows * 2 * STEP  # of x in a slot
        self.row_tiles = pl.cdiv(problem.m, tiles.rows)
        self.row_group = max(d for d in range(1, ROW_GROUP + 1) if self.row_tiles % d == 0)
        self.output_tiles = pl.cdiv(self.left.outputs, CLUSTER * OUTPUTS)  # of a cluster
        self.units = pl.cdiv(self.left.contracted, 2 * STEP)  # of a tile: two steps each
        self.count = self.output_tiles * self.row_tiles  # of tiles
        self.division = divide(tiles, self.count, self.units, sms)
        self.clusters, self.shares = self.division.clusters, self.division.shares
        self.rounds, self.rest = self.division.rounds, self.division.rest
        self.in_rounds = self.rounds * self.clusters  # tiles
        # What the rounds leave is counted in grains: units, or whole tiles.
        self.grain = 1 if self.division.splits else self.units
        self.grains = self.rest * (self.units // self.grain)
        starts = [self.begin(c) % self.units for c in range(self.clusters)]
        self.uneven = self.shares == 1 and any(starts)

    def begin(self, cluster):
        """The first unit of a cluster's share of the rest (of its end, for their number)."""
        return cluster * self.grains // self.clusters * self.grain

    def last_cluster(self, tile):
        """The cluster whose share has the last unit of a tile of the rest."""
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


class Segment(NamedTuple):
    """A tile, or the part of one that a share has."""

    tile: mg.Int
    step: mg.Int  # the first, of the share
    units: mg.Int
    begins: ir.Value  # whether it has the tile's first unit
    ends: ir.Value


class Share:
    """A cluster's share of the work, in the registers of a thread; its steps count from 0."""

    def __init__(self, layout: Layout):
        self.layout, self.rank = layout, mg.cluster_rank()
        # Later numbers are for earlier work: the head of a tile waits for the clusters of its tail.
        self.cluster = mg.Int(layout.clusters - 1) - mg.block_index() // CLUSTER
        self.first, self.end = layout.begin(self.cluster), layout.begin(self.cluster + 1)
        self.whole = layout.rounds * layout.units  # units
        self.steps = self.end - self.first + self.whole << 1

    def place(self, p: mg.Int) -> tuple[mg.Int, mg.Int, mg.Int]:
        """First output, first row of x and step in its tile of step p."""
        layout, steps = self.layout, 2 * self.layout.units
        in_rounds = p < 2 * self.whole
        p = mg.select(in_rounds, p, p - 2 * self.whole + (self.first << 1))
        tile = mg.select(in_rounds, self._of_round(p // steps), p // steps + layout.in_rounds)
        return *self.origin(tile), p % steps

    def _of_round(self, i: mg.Int) -> mg.Int:
        return i * self.layout.clusters + self.cluster

    def segments(self) -> mg.Int:
        """Their number."""
        units = self.layout.units
        return (self.end + (units - 1)) // units - self.first // units + self.layout.rounds

    def segment(self, i: mg.Int) -> Segment:
        """The i-th one."""
        layout, units = self.layout, self.layout.units
        tile = self.first // units + (i - layout.rounds)  # of the rest
        head, tail = tile * units, (tile + 1) * units
        begins, ends = self.first < head + 1, tail < self.end + 1
        start = mg.select(begins, head, self.first)
        count = tail.at_most(self.end) - start
        step = start - self.first + self.whole << 1
        in_rounds = i < layout.rounds
        return Segment(
            mg.select(in_rounds, self._of_round(i), tile + layout.in_rounds),
            mg.select(in_rounds, i * (2 * units), step),
            mg.select(in_rounds, mg.Int(units), count),
            mg.either(in_rounds, begins),
            mg.either(in_rounds, ends),
        )

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
