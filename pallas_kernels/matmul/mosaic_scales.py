"""Block scales inside a Mosaic kernel: rows of them arrive with the packed bytes, in any alignment.

A row of scales is copied as the 16-byte granules that hold it, so a reader adds the row's offset in
its first granule. Double-quantized scales arrive as codes, with the second-level values of the
tile's rows; each warp decodes its own once and shares them through shared memory.
"""

import copy
import dataclasses

from pallas_kernels import mosaic as mg
from pallas_kernels.matmul.problem import Problem
from pallas_kernels.scales import SECOND_LEVEL_BLOCK

GRANULE = 16  # bytes: alignment and size of bulk copies
TABLE_BYTES = 1024
WARP_ROWS = 16  # weight rows of a warp's tile


def _granules(size: int) -> int:
    return -(-size // GRANULE) * GRANULE


@dataclasses.dataclass(frozen=True)
class ScaleLayout:
    """Where a tile's scales lie in shared memory.

    Attributes:
        rows: weight rows of the tile.
        span: the most scales of a row that it needs.
        aligned: each row's first scale starts a granule.
        ragged: readers may ask for scales past the end of a row.
    """

    problem: Problem
    rows: int
    span: int
    aligned: bool
    ragged: bool

    @property
    def itemsize(self) -> int:
        """Bytes of a stored scale."""
        return 1 if self.problem.double else 4

    @property
    def pitch(self) -> int:
        """Bytes between rows: an odd number of granules, so that 8 rows are in different banks."""
        granules = _granules(self.span * self.itemsize + (0 if self.aligned else GRANULE - 1))
        return granules | GRANULE

    @property
    def groups(self) -> int:
        """Bytes for the second-level values."""
        if not self.problem.double:
            return 0
        count = ((self.rows - 1) * self.problem.pitch + self.span) // SECOND_LEVEL_BLOCK + 2
        return _granules(4 * count + GRANULE)

    @property
    def size(self) -> int:
        """Bytes of a tile's scales."""
        return self.rows * self.pitch + self.groups


class ScaleReader:
    """Copies and reads scales of one weight, or of slice `layer` of a stack.

    `between` gives a reader for a range of blocks; columns count from its first.
    """

    def __init__(self, layout: ScaleLayout, refs: list[mg.Value], layer: mg.Int):
        """Take `Operands.scales`."""
        self.layout, self.problem = layout, layout.problem
        bases = [mg.global_address(ref) for ref in refs]
        self.row_bytes = self.problem.blocks * layout.itemsize
        self.start = bases[0] + layer.wide() * (self.problem.n * self.row_bytes)
        if self.problem.double:
            _, absmax, offset, self.table_source, origin = bases
            self.absmax = absmax + layer.wide() * (4 * self.problem.groups)
            self.offset = mg.load_float(offset + (layer << 2).wide())
            self.row0, self.block0 = mg.load_word(origin), mg.load_word(origin + 4)
            if self.problem.stacked_table:
                self.table_source = self.table_source + layer.wide() * TABLE_BYTES

    def between(self, first_k: mg.Int, last_k: mg.Int) -> "ScaleReader":
        """This reader for the blocks that hold a range of k, both ends included."""
        reader = copy.copy(self)
        reader.first = first_k // self.problem.block_size
        reader.count = last_k // self.problem.block_size - reader.first + 1
        reader.source = self.start + (reader.first * self.layout.itemsize).wide()
        return reader

    def _window(self, start: mg.Int, size: mg.Int) -> tuple[mg.Int, mg.Int]:
        """The granules that hold `size` bytes from a global address, and no other."""
        offset = start.narrow() & (GRANULE - 1)
        return start - offset.wide(), (offset + size + (GRANULE - 1)) & -GRANULE

    def row_window(self, row: mg.Int) -> tuple[mg.Int, mg.Int]:
        """What to copy for a row of the weight."""
        start = self.source + row.wide() * self.row_bytes
        return self._window(start, self.count * self.layout.itemsize)

    def row_offset(self, row: mg.Int) -> mg.Int:
        """Bytes of a row's first granule before its first scale."""
        if self.layout.aligned:
            return mg.Int(0)
        return (self.source.narrow() + row * self.row_bytes) & (GRANULE - 1)

    def _group(self, row: mg.Int, block: mg.Int) -> mg.Int:
        """The second-level value of a scale; `block` counts from `first`."""
        position = (row + self.row0) * self.problem.pitch + (self.block0 + self.first) + block
        return position // SECOND_LEVEL_BLOCK

    def group_window(self, first_row: mg.Int, last_row: mg.Int) -> tuple[mg.Int, mg.Int]:
        """What to copy of the second level for a range of rows, both ends included."""
        first = self._group(first_row, mg.Int(0))
        size = (self._group(last_row, self.count - 1) - first + 1) << 2
        return self._window(self.absmax + (first << 2).wide(), size)

    def load_table(self) -> list[mg.Int]:
        """A warp's share of the 8-bit table, for `store_table`; loaded early, stored late."""
        lane = mg.thread_index() & 31
        places = range(0, TABLE_BYTES // 4, mg.WARP)
        return [mg.load_word(self.table_source + ((lane + p) << 2).wide()) for p in places]

    def store_table(self, table: mg.Int, words: list[mg.Int]) -> None:
        """By one warp: the table to shared memory."""
        lane = mg.thread_index() & 31
        for i, word in enumerate(words):
            mg.store(table + ((lane + i * mg.WARP) << 2), word)

    def read(self, tile: mg.Int, tile_row: mg.Int, row: mg.Int, column: mg.Int, count: int):
        """`count` float32 scales of a row from a column on, the last one again past the end."""
        address = tile + tile_row * self.layout.pitch + self.row_offset(row)
        if self.layout.aligned and not self.layout.ragged:
            return mg.load_floats(address + (column << 2), count)
        columns = [(column + i).at_most(self.count - 1) for i in range(count)]
        return [mg.load_float(address + (c << 2)) for c in columns]

    def load_raw(self, tile, tile_row, row, first_row, column) -> tuple[mg.Int, mg.Value]:
        """Code and second-level value of a double-quantized scale of a tile in shared memory."""
        code = mg.load_byte(tile + tile_row * self.layout.pitch + self.row_offset(row) + column)
        groups = tile + self.layout.rows * self.layout.pitch
        first = self._group(first_row, mg.Int(0))
        skipped = ((self.absmax.narrow() >> 2) + first) & 3  # of the window's first granule
        group = self._group(row, column) - first + skipped
        return code, mg.load_float(groups + (group << 2))

    def decode(self, raw: tuple[mg.Int, mg.Value], table: mg.Int) -> mg.Value:
        """The float32 scale, bit for bit as `decode_scales` gives it."""
        code, absmax = raw
        return mg.mul_then_add(mg.load_float(table + (code << 2)), absmax, self.offset)
