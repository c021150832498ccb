"""Block scales inside a Mosaic kernel: each warp copies its own through a ring in shared memory.

A unit is what a warp needs at a time: a few consecutive scales of 16 weight rows. It comes by small
asynchronous copies, of 4 to 16 bytes, which suit any alignment and need no barrier. Of
double-quantized scales the codes come, as the words that hold them, with the second-level values;
the warp decodes each scale once and shares it through shared memory.
"""

import dataclasses

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels.matmul.problem import Problem
from pallas_kernels.scales import SECOND_LEVEL_BLOCK

TABLE_BYTES = 1024
ROWS = 16  # of a unit


@dataclasses.dataclass(frozen=True)
class ScaleLayout:
    """Where a unit's scales lie in shared memory.

    Attributes:
        span: k of a unit, a power of two; a unit starts at a multiple of it.
    """

    problem: Problem
    span: int

    @property
    def columns(self) -> int:
        """Scales of a row."""
        return max(1, self.span // self.problem.block_size)

    @property
    def aligned(self) -> int:
        """Scales that can be copied at once: a row's first one is aligned to that many."""
        return next(c for c in (4, 2, 1) if self.columns % c == 0 and self.problem.blocks % c == 0)

    @property
    def words(self) -> int:
        """Words of codes of a row."""
        straddles = self.aligned < min(4, self.columns)
        return max(1, self.columns // 4) + straddles

    @property
    def groups(self) -> int:
        """Second-level values of a row."""
        return min(2, self.columns)

    @property
    def size(self) -> int:
        """Bytes of a unit in the ring."""
        row = self.words + self.groups if self.problem.double else self.columns
        return 4 * ROWS * row

    @property
    def decoded(self) -> int:
        """Bytes in which a warp shares the scales that it has decoded."""
        return 4 * ROWS * self.columns if self.problem.double else 0


class WarpScales:
    """One warp's ring of scales, of one weight or of slice `layer` of a stack.

    For each unit in turn: `start` and `commit`; after those of `depth` - 1 more units `load`,
    `decode` and `read`, before the next `start` in its place.
    """

    def __init__(self, layout: ScaleLayout, refs: list[mg.Value], layer: mg.Int):
        """Take `Operands.scales`."""
        self.layout, self.problem = layout, layout.problem
        self.lane = mg.thread_index() & 31
        self.rows = [self.lane >> 2, (self.lane >> 2) + 8]
        bases = [mem.global_address(ref) for ref in refs]
        self.source = bases[0]
        self.first = layer * (self.problem.n * self.problem.blocks)  # scale of this slice
        if self.problem.double:
            _, absmax, offset, self.table_source, origin = bases
            self.absmax = absmax + layer.wide() * (4 * self.problem.groups)
            self.offset = mem.load_float(offset + (layer << 2).wide())
            self.row0 = self.block0 = mg.Int(0)
            if self.problem.part:  # else no copy waits for a load
                self.row0, self.block0 = mem.load_word(origin), mem.load_word(origin + 4)
            if self.problem.stacked_table:
                self.table_source = self.table_source + layer.wide() * TABLE_BYTES

    def place(self, ring: mg.Int, depth: int, decoded=None, table=None) -> None:
        """Give the shared memory of the warp's ring, what it decodes and the 8-bit table."""
        self.ring, self.depth, self.decoded, self.table = ring, depth, decoded, table

    # The 8-bit table

    def load_table(self) -> list[mg.Int]:
        """A warp's share of the table, for `store_table`; loaded early, stored late."""
        places = range(0, TABLE_BYTES // 4, mg.WARP)
        return [mem.load_word(self.table_source + ((self.lane + p) << 2).wide()) for p in places]

    def store_table(self, words: list[mg.Int]) -> None:
        """By one warp: the table to shared memory."""
        for i, word in enumerate(words):
            mem.store(self.table + ((self.lane + i * mg.WARP) << 2), word)

    # Copies

    def start(self, slot: mg.Int, row: mg.Int, column: mg.Int) -> None:
        """Start to copy the unit from a row and column of the weight's scales on."""
        target = self.unit(slot)
        if self.problem.double:
            self._copy(target, self.layout.words, 4, lambda r, i: self._codes(row + r, column, i))
            target = target + 4 * ROWS * self.layout.words
            self._copy(target, self.layout.groups, 4, lambda r, i: self._absmax(row + r, column, i))
        else:
            size = self.layout.aligned
            parts = self.layout.columns // size
            last = self.problem.blocks - size  # past the end x is 0, and any scale will do

            def source(r: mg.Int, part: mg.Int) -> mg.Int:
                place = self._scale(row + r) + (column + part * size).at_most(last)
                return self.source + place.wide() * 4

            self._copy(target, parts, 4 * size, source)

    def commit(self) -> None:
        """End a unit's copies; for each unit, also where there is nothing to copy."""
        mem.commit_copies()

    def _copy(self, target: mg.Int, parts: int, size: int, source) -> None:
        """Copy `parts` parts of `size` bytes for each row, a lane for each."""
        for first in range(0, ROWS * parts, mg.WARP):
            index = self.lane + first
            with mg.when(index < ROWS * parts):
                mem.copy_async(target + index * size, source(index // parts, index % parts), size)

    def _scale(self, row: mg.Int) -> mg.Int:
        """The first scale of a row of the weight, in its array; the last row again past the end."""
        return row.at_most(self.problem.n - 1) * self.problem.blocks + self.first

    def _codes(self, row: mg.Int, column: mg.Int, i: mg.Int) -> mg.Int:
        last = self.first + (self.problem.n * self.problem.blocks - 1)
        place = ((self._scale(row) + column & -4) + (i << 2)).at_most(last)
        return self.source + (place & -4).wide()

    def _absmax(self, row: mg.Int, column: mg.Int, i: mg.Int) -> mg.Int:
        group = (self._group(row, column) + i).at_most(self.problem.groups - 1)
        return self.absmax + (group << 2).wide()

    def _group(self, row: mg.Int, column: mg.Int) -> mg.Int:
        """The second-level value of a scale."""
        row = row.at_most(self.problem.n - 1)
        position = (row + self.row0) * self.problem.pitch + self.block0 + column
        return position // SECOND_LEVEL_BLOCK

    # Use

    def load(self, slot: mg.Int, row: mg.Int, column: mg.Int) -> list:
        """Wait for a unit, and start what `decode` finishes."""
        mem.wait_copies(self.depth - 1)
        mg.sync_warp()
        if not self.problem.double:
            return []
        raw, columns = [], self.layout.columns
        for first in range(0, ROWS * columns, mg.WARP):
            index = (self.lane + first) % (ROWS * columns)
            place = row, column, index // columns, index % columns
            raw.append((index, self._load_raw(self.unit(slot), *place)))
        return raw

    def decode(self, raw: list) -> None:
        """Decode double-quantized scales, for `read`."""
        for index, (code, absmax) in raw:
            entry = mem.load_float(self.table + (code << 2))
            # Bit for bit as `decode_scales` gives it.
            scale = mg.mul_then_add(entry, absmax, self.offset)
            mem.store(self.decoded + (index << 2), scale)
        if raw:
            mg.sync_warp()

    def read(self, slot: mg.Int, first: int, count: int) -> list[list]:
        """Scales of the mma rows of this lane, lane // 4 and that + 8, from a column on."""
        base = self.decoded if self.problem.double else self.unit(slot)
        rows = [base + (row * (4 * self.layout.columns) + 4 * first) for row in self.rows]
        return [mem.load_floats(row, count) for row in rows]

    def unit(self, slot: mg.Int) -> mg.Int:
        """A place in the ring."""
        return self.ring + slot * self.layout.size

    def _load_raw(self, unit, row, first, tile_row, i) -> tuple[mg.Int, mg.Value]:
        """Code and second-level value of scale i of a row of the unit."""
        byte = (self._scale(row + tile_row) + first & 3) + i
        code = mem.load_byte(unit + tile_row * (4 * self.layout.words) + byte)
        row = row + tile_row
        group = self._group(row, first + i) - self._group(row, first)
        groups = unit + 4 * ROWS * self.layout.words
        return code, mem.load_float(groups + (tile_row * self.layout.groups + group << 2))
