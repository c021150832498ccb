"""Tiles of the matmul kernels: what can be chosen, and an estimate for shapes not measured."""

import dataclasses
import math

DECODE_PANEL = 256  # k of a warp's step in `mosaic_decode`
MID_STAGE = 256  # k of a stage in `mosaic_mid`
MID_ROWS = 128  # weight rows of a block of `mosaic_mid`
_BYTES_PER_US = 22_700  # of one SM when all of them stream: 3.0 TB/s over 132
_TILE_US = 0.1  # a tile's cost beside its bytes: barriers and the sum over warps
_SUM_US = 1.3  # the kernel that sums slabs
_BLOCK_US = 4.0  # a block of `mosaic_mid` beside its stages: table, first copies, result


@dataclasses.dataclass(frozen=True)
class DecodeTiles:
    """Tiles of `mosaic_decode`.

    Attributes:
        warps: warps of a block, a multiple of 4, that split a slab.
        slabs: parts of K in different blocks, summed by a second kernel when there are several.
        stages: packed tiles in flight in a block.
    """

    warps: int = 16
    slabs: int = 1
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class MidTiles:
    """Tiles of `mosaic_mid`.

    Attributes:
        slabs: parts of K in different blocks, summed by a second kernel when there are several.
        stages: stages of 256 k in flight in a block, at least 2.
        window: k whose scales are decoded at once, a multiple of 256.
        depth: k that a warpgroup decodes and multiplies at once, 64 or 128.
        overlap: a warpgroup decodes the next part while it multiplies.
    """

    slabs: int = 1
    stages: int = 3
    window: int = 2048
    depth: int = 64
    overlap: bool = True


def decode_candidates(m: int, n: int, k: int, block_size: int, sms: int) -> list[DecodeTiles]:
    """Tiles whose fragments of x fit in registers, the least estimated time first."""
    panels, row_tiles = math.ceil(k / DECODE_PANEL), math.ceil(n / 16)

    def fits(warps: int, slabs: int) -> bool:
        # A group of 8 rows of x and a panel take 32 registers, of 64 K / threads that there are.
        fragments = math.ceil(m / 8) * math.ceil(math.ceil(panels / slabs) / warps)
        return fragments <= (4 if warps <= 8 else 2 if warps <= 16 else 1)

    def time(tiles: DecodeTiles) -> tuple[float, int]:
        slab = math.ceil(panels / tiles.slabs)
        size = slab * DECODE_PANEL * 16 * (0.5 + 4 / block_size)
        waves = math.ceil(row_tiles / (sms // tiles.slabs))
        idle = math.ceil(slab / tiles.warps) * tiles.warps / slab - 1  # warps that wait for others
        us = waves * (size / _BYTES_PER_US * (1 + idle / 4) + _TILE_US)
        # Ties go to 16 warps: 4 for each scheduler.
        return us + (_SUM_US if tiles.slabs > 1 else 0), abs(tiles.warps - 16)

    sizes = [(w, s) for w in (4, 8, 12, 16, 28) for s in range(1, min(panels, sms // 2) + 1)]
    return sorted((DecodeTiles(w, s) for w, s in sizes if fits(w, s)), key=time)


def mid_candidates(m: int, n: int, k: int, block_size: int, sms: int) -> list[MidTiles]:
    """Tiles, the least estimated time first; among equals those with more in flight."""
    row_tiles, steps = math.ceil(n / MID_ROWS), math.ceil(k / MID_STAGE)
    stage_us = 0.6 + m / 100  # measured on 4096 x 14336

    def time(slabs: int) -> float:
        waves = math.ceil(row_tiles * slabs / sms)
        us = waves * (math.ceil(steps / slabs) * stage_us + _BLOCK_US)
        return us + (_SUM_US if slabs > 1 else 0)

    stages = 5 if m <= 16 else 4 if m <= 32 else 3 if m <= 64 else 2
    windows = [w for w in (2048, 1024, 512, 256) if w <= max(256, 32 * block_size)]
    return [
        MidTiles(slabs, s, window)
        for slabs in sorted(range(1, min(steps, 16) + 1), key=time)
        for s in range(stages, 1, -1)
        for window in windows
    ]
