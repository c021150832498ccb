"""Tiles of the matmul kernels: what can be chosen, and an estimate for shapes not measured."""

import dataclasses
import itertools
import math

PANEL = 256  # k of 16 weight rows that a warp takes at a time
MID_ROWS = 128  # weight rows of a block of `mosaic_mid`
_BYTES_PER_US = 22_700  # of one SM when all of them stream: 3.0 TB/s over 132
_X_US = 1 / 300  # a row of a panel of x, which a block takes before it starts
_DOUBLE_US = 1.4  # a tile's double-quantized scales, times the warps that decode them
_CLUSTER_US = 0.03  # what slabs cost
_DECODE_ROWS = 8  # up to here `mosaic_decode`, where it can
_MOST_DECODE_ROWS = 16  # above here `mosaic_mid` alone
# Of `mosaic_mid`, from 4096 x 14336, 14336 x 4096 and 4096 x 4096 at M = 32, 64 and 128:
_BLOCK_US = 4.0  # a block beside its panels: launch, table, first copies, result
_PANEL_US = 0.72, 1 / 113  # a panel, and a row of x of it
_SHARE_US = 0.045, 0.1  # of a tile in several blocks: a row of x, and a block
_UNEVEN = 1.12  # where blocks do not begin with tiles: they read farther apart


@dataclasses.dataclass(frozen=True)
class DecodeTiles:
    """Tiles of `mosaic_decode`.

    Attributes:
        warps: warps of a block, a multiple of 4, that split a slab.
        slabs: parts of K, at most 8, in the blocks of a cluster, which send each other their sums.
        stages: packed panels of 256 k in flight in a warp.
        shared_x: x stays in shared memory, not in registers.
        together: where a warp has one panel of a tile, all of a block ask for the next at once, at
            the end of a tile; else each when it has read the last.
    """

    warps: int = 16
    slabs: int = 1
    stages: int = 2
    shared_x: bool = False
    together: bool = True


@dataclasses.dataclass(frozen=True)
class MidTiles:
    """Tiles of `mosaic_mid`.

    Attributes:
        blocks: blocks that share the work evenly.
        stages: panels of 256 k in flight in a warp.
        x_stages: parts of x in flight in a team of 8 warps, at least 2.
        x_depth: k of a part of x: 64, 128 or 256.
    """

    blocks: int = 132
    stages: int = 2
    x_stages: int = 2
    x_depth: int = 128


def candidates(
    m: int, n: int, k: int, block_size: int, sms: int, double: bool = False
) -> list[DecodeTiles | MidTiles]:
    """Tiles of the kernels that take M rows, the likely best first."""
    shape = m, n, k, block_size, sms
    if m > _MOST_DECODE_ROWS:
        return [*mid_candidates(*shape)]
    decode, mid = decode_candidates(*shape, double), mid_candidates(*shape)
    if m <= _DECODE_ROWS:  # the other where K is so long that x does not fit
        return [*decode, *mid]
    # Few panels keep few warps of `mosaic_mid` busy.
    large = k >= 4096 and n * k >= (1 << 23 if double else 3 << 24)
    both = [mid, decode] if large else [decode, mid]
    return [tiles for pair in itertools.zip_longest(*both) for tiles in pair if tiles is not None]


def decode_candidates(
    m: int, n: int, k: int, block_size: int, sms: int, double: bool = False
) -> list[DecodeTiles]:
    """Tiles whose fragments of x fit in registers or stay out of them, the least time first."""
    panels, row_tiles = math.ceil(k / PANEL), math.ceil(n / 16)

    def steps(tiles: DecodeTiles) -> int:
        return math.ceil(math.ceil(panels / tiles.slabs) / tiles.warps)

    def fits(tiles: DecodeTiles) -> bool:
        # A group of 8 rows of x and a panel take 32 registers, of 64 K / threads that there are.
        return tiles.shared_x or math.ceil(m / 8) * steps(tiles) <= (4 if tiles.warps <= 8 else 2)

    def time(tiles: DecodeTiles) -> float:
        slab = math.ceil(panels / tiles.slabs)
        size = slab * PANEL * 16 * (0.5 + 4 / block_size)
        waves = math.ceil(row_tiles / (sms // tiles.slabs))
        idle = steps(tiles) * tiles.warps / slab - 1  # warps that wait for others
        slower = 1 + 0.75 * idle + max(0, 16 - tiles.warps * tiles.stages) / 100
        if tiles.shared_x:  # it takes longer the more there is; slabs gain less than elsewhere
            slower += 0.01 + m / 40 + (tiles.slabs - 1) / 20
        else:
            slower += (steps(tiles) - 1) / 40
        us = waves * size / _BYTES_PER_US * slower + slab * m * _X_US
        if double:  # few warps wait longer while their scales are decoded
            us += waves * _DOUBLE_US / tiles.warps
        return us + (_CLUSTER_US if tiles.slabs > 1 else 0)

    # Two blocks are neighbours on the GPU: all clusters of two run at once, not those of more.
    slabs = (1, 2) if panels > 8 else (1,)
    sizes = [(warps, count, 2) for warps, count in itertools.product((16, 12, 8, 4), slabs)]
    sizes += [(8, count, stages, True) for count in slabs for stages in (3, 2)]
    return sorted(filter(fits, itertools.starmap(DecodeTiles, sizes)), key=time)


def mid_candidates(m: int, n: int, k: int, block_size: int, sms: int) -> list[MidTiles]:
    """Tiles, the least estimated time first."""
    row_tiles, panels = math.ceil(n / MID_ROWS), math.ceil(k / PANEL)
    total = row_tiles * panels
    base, slope = _PANEL_US

    def even(blocks: int) -> bool:
        """Whether all blocks begin with tiles, or all tiles with blocks."""
        return row_tiles % blocks == 0 or blocks % row_tiles == 0

    def time(blocks: int) -> float:
        pairs = math.ceil(total / blocks / 2)  # a panel for each team
        us = 2 * pairs * (base + slope * m) * (1 if even(blocks) else _UNEVEN) + _BLOCK_US
        if row_tiles % blocks:
            us += _SHARE_US[0] * m + _SHARE_US[1] * blocks / row_tiles
        return us

    # (stages, x_stages, x_depth): a stage takes 36 KB, one of x 4 x_depth bytes for each row of x.
    depth = 256 if m <= 32 else 128 if m <= 64 else 64
    flights = [(2, 2, depth), (2, 3, max(64, depth // 2)), (2, 2, 64), (1, 2, 64)]
    most = min(sms, total)
    blocks = sorted((b for b in range(1, most + 1) if even(b) or b == most), key=time)
    return [MidTiles(b, *flight) for flight in dict.fromkeys(flights) for b in blocks[:4]]
