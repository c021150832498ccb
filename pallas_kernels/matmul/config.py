"""Tiles of the matmul kernels: what can be chosen, and an estimate for shapes not measured."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

PANEL = 256  # k of 16 weight rows that a warp takes at a time
MID_ROWS = 256  # weight rows of the warps of a block of `mosaic_mid`, at one k or at several
_BYTES_PER_US = 22_700  # of one SM when all of them stream: 3.0 TB/s over 132
_X_US = 1 / 300  # a row of a panel of x, which a block takes before it starts
_DOUBLE_US = 1.4  # a tile's double-quantized scales, times the warps that decode them
_CLUSTER_US = 0.03  # what slabs cost
_DECODE_ROWS = 8  # up to here `mosaic_decode`, where it can
_MOST_DECODE_ROWS = 16  # above here `mosaic_mid` alone
# Of `mosaic_mid`, by teams: a kernel, a row of x; where each team takes a panel, a row of x of it.
_MID_US = {
    1: (3.1, 0.039, 1.37, 0.0111),
    2: (3.7, 0.006, 1.11, 0.0184),
    4: (2.6, 0.012, 1.67, 0.0154),
}
_MID_CLUSTER_US = 0.16  # of a tile in a cluster: a block but the first
_SHARE_US = 0.03, 0.2  # of a tile in several blocks, no cluster: a row of x, and a block
_UNEVEN = 1.12, 0.25  # where blocks do not begin with tiles: a panel, and a block of a tile
_ONE_TEAM_ROWS = 65  # no faster for fewer
MOST_CLUSTER = 8  # blocks that any device takes (CUDA C++ Programming Guide)


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
        x_stages: parts of x in flight in a team, at least 2.
        x_depth: k of a part of x: 64, 128 or 256.
        teams: parts of a block's warps, 1, 2 or 4, that take turns in the panels of a tile of 256,
            128 or 64 rows; but for 2, `blocks` is a multiple of the tiles.
        cluster: the blocks of a tile, at most 8, are a cluster, and exchange sums through their
            shared memory; `blocks` is a multiple of the tiles.
    """

    blocks: int = 132
    stages: int = 2
    x_stages: int = 2
    x_depth: int = 128
    teams: int = 2
    cluster: bool = False

    @property
    def rows(self) -> int:
        """Weight rows of a tile."""
        return MID_ROWS // self.teams


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


def mid_time(tiles: MidTiles, m: int, n: int, k: int) -> float:
    """Microseconds that `mosaic_mid` is estimated to take."""
    row_tiles, panels = math.ceil(n / tiles.rows), math.ceil(k / PANEL)
    start, row, panel, panel_row = _MID_US[tiles.teams]
    shares = tiles.blocks / row_tiles  # of a tile
    mean = panels / shares / tiles.teams  # panels of a team
    most = math.ceil(math.ceil(panels / shares) / tiles.teams)
    work = (panel + panel_row * m) * (7 * most + mean) / 8  # teams that wait leave more to others
    us = start + row * m
    if tiles.cluster:
        return us + work + _MID_CLUSTER_US * (shares - 1)
    if row_tiles % tiles.blocks:
        us += _SHARE_US[0] * m + _SHARE_US[1] * shares
        if tiles.blocks % row_tiles:
            work, us = work * _UNEVEN[0], us + _UNEVEN[1] * shares
    return us + work


def mid_candidates(m: int, n: int, k: int, block_size: int, sms: int) -> list[MidTiles]:
    """Tiles, the least estimated time first."""
    panels = math.ceil(k / PANEL)
    counts = (1, 2, 4) if m >= _ONE_TEAM_ROWS else (2, 4)
    choices = [tiles for teams in counts for tiles in _mid_blocks(n, panels, teams, sms)]
    choices.sort(key=lambda tiles: mid_time(tiles, m, n, k))
    # Of what may not fit in shared memory, something that does.
    choices = choices[:4] + [tiles for tiles in choices[4:] if tiles == MidTiles(tiles.blocks)][:1]
    flights = [_flight(m, tiles.teams) for tiles in choices]
    return list(
        dict.fromkeys(
            dataclasses.replace(tiles, stages=stages, x_stages=x_stages, x_depth=x_depth)
            for at_once in zip(*flights, strict=True)
            for tiles, (stages, x_stages, x_depth) in zip(choices, at_once, strict=True)
        )
    )


def _mid_blocks(n: int, panels: int, teams: int, sms: int) -> Iterator[MidTiles]:
    """Into how many blocks the work can be divided."""
    row_tiles = math.ceil(n / MidTiles(teams=teams).rows)
    most = min(sms, row_tiles * panels)
    for blocks in range(1, most + 1):
        even = row_tiles % blocks == 0 or blocks % row_tiles == 0
        if blocks == row_tiles or (teams == 2 and (even or blocks == most)):
            yield MidTiles(blocks, teams=teams)
    for size in range(2, min(MOST_CLUSTER, panels) + 1):
        # Multiprocessors are in groups: of 132, 66 clusters of 2 ran at once, and some 96 / size
        # of more, not 40 of 3 or 32 of 4.
        if row_tiles <= (sms // 2 if size == 2 else sms * 8 // 11 // size):
            yield MidTiles(row_tiles * size, teams=teams, cluster=True)


def _flight(m: int, teams: int) -> list[tuple[int, int, int]]:
    """(stages, x_stages, x_depth), the likely best first.

    A stage takes 36 KB, one of x 2 x_depth bytes for each team and row of x.
    """
    if teams == 4 and m > 120:
        return 4 * [(1, 2, 64)]
    depth = 512 if m <= 32 else 256 if m <= 64 else 128
    depth = min(256, max(64, depth // teams))
    return [(2, 2, depth), (2, 3, max(64, depth // 2)), (2, 2, 64), (1, 2, 64)]
