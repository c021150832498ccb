"""Tile choice of the matmul for many rows of x, and its time against decoding first."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class LargeTiles:
    """Tiles of `mosaic_large`, each of 128 outputs.

    Attributes:
        rows: rows of x of a tile, a multiple of 64 up to 256.
        slots: steps in flight.
        split: the most blocks that share a tile, about; 0 gives blocks whole tiles.
    """

    rows: int = 256
    slots: int = 5
    split: int = 8


LARGE_TILES = (
    LargeTiles(256, 5, 0),
    LargeTiles(256, 5, 2),
    LargeTiles(256, 5, 4),
    LargeTiles(256, 5, 8),
    LargeTiles(128, 8, 0),
    LargeTiles(128, 8, 2),
)
# Microseconds, by measurement on an H100 (SXM): of a step, by the tile's rows of x; of a launch;
# of a tile's start and result; of leaving a sum and of adding one.
_STEP_US = {256: 0.69, 128: 0.40}
_LAUNCH_US, _TILE_US, _SUM_US = 3.0, 2.5, 3.0


def large_time(tiles: LargeTiles, m: int, outputs: int, contracted: int, sms: int) -> float:
    """Estimated microseconds of `mosaic_large`."""
    count = math.ceil(outputs / 256) * math.ceil(m / tiles.rows)  # a cluster's, of two blocks
    steps = math.ceil(contracted / 128) * 2
    clusters = min(sms // 2, count * max(1, tiles.split))
    share = count / clusters if tiles.split else math.ceil(count / clusters)
    sums = max(1, clusters / count) if tiles.split else 0
    step = _STEP_US[tiles.rows]
    return _LAUNCH_US + share * steps * step + math.ceil(share) * _TILE_US + sums * _SUM_US


def choose_large(m: int, outputs: int, contracted: int, sms: int) -> LargeTiles:
    """The tiles of the least estimated time."""
    return min(LARGE_TILES, key=lambda t: large_time(t, m, outputs, contracted, sms))


def decoded_time(m: int, n: int, k: int) -> float:
    """Estimated microseconds of a decode kernel and then XLA's dot, on an H100 (SXM)."""
    # XLA's dot of a small weight (4096 x 4096) is slow until there are many rows.
    rate = 600e6 if n * k <= 2**25 and m < 8192 else 780e6
    return n * k * (2.5 + 4 / 64) / 2.75e6 + 2 + 2 * m * n * k / rate
