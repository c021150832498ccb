"""Tile choice of the matmul for many rows of x, and its time against decoding first."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class LargeTiles:
    """Tiles of `mosaic_large`, each of 128 outputs.

    Attributes:
        rows: rows of x of a tile, a multiple of 64 up to 256.
        slots: steps in flight.
        split: pairs of blocks for a tile, at most; 0 gives each whole tiles.
        parts: pairs of blocks of a cluster, for a tile together: 1, 2 or 4; above 1 `split` is 0.
    """

    rows: int = 256
    slots: int = 5
    split: int = 2
    parts: int = 1


LARGE_TILES = (
    LargeTiles(256, 5, 0),
    LargeTiles(256, 5, 2),
    LargeTiles(256, 5, 4),
    LargeTiles(128, 8, 0),
    LargeTiles(128, 8, 2),
    LargeTiles(256, 5, 0, 2),
    LargeTiles(256, 5, 0, 4),
    LargeTiles(128, 8, 0, 2),
)
# Microseconds, by measurement on an H100 (SXM): of a step of 64, of adding a sum through device
# memory and of adding those of parts, by the tile's rows of x; of a launch; of starting and storing
# a tile, or a share of one.
_STEP_US = {256: 0.695, 128: 0.54}
_SUM_US = {256: 5.5, 128: 3.0}
_EXCHANGE_US = {256: 3.5, 128: 2.0}
_LAUNCH_US, _TILE_US = 3.5, 2.6
_CACHED_ROWS, _UNCACHED = 2048, 1.1  # beyond so many rows of x, steps take longer
_GPC_SMS = 16  # that every group of SMs has, where a cluster must find place


def large_time(tiles: LargeTiles, m: int, outputs: int, contracted: int, sms: int) -> float:
    """Estimated microseconds of `mosaic_large`."""
    count = math.ceil(outputs / 256) * math.ceil(m / tiles.rows)  # of tiles, each of a pair
    step = _STEP_US[tiles.rows] * (_UNCACHED if m > _CACHED_ROWS else 1)
    steps = 2 * math.ceil(contracted / 128)
    if tiles.parts > 1:
        clusters = sms // _GPC_SMS * (_GPC_SMS // (2 * tiles.parts))
        each = steps / tiles.parts * step + _TILE_US + _EXCHANGE_US[tiles.rows]
        return _LAUNCH_US + math.ceil(count / clusters) * each
    pairs = min(sms // 2, count * max(1, tiles.split))
    share = count / pairs if tiles.split else math.ceil(count / pairs)
    begun, sums = math.ceil(share), 0
    if pairs > count:  # of a tile: the head adds the others
        sums = math.ceil(pairs / count) - (pairs % count == 0)
    elif share % 1:
        begun, sums = begun + 1, 1
    return _LAUNCH_US + share * steps * step + begun * _TILE_US + sums * _SUM_US[tiles.rows]


def choose_large(m: int, outputs: int, contracted: int, sms: int) -> LargeTiles:
    """The tiles of the least estimated time."""
    return min(LARGE_TILES, key=lambda t: large_time(t, m, outputs, contracted, sms))


def decoded_time(m: int, n: int, k: int) -> float:
    """Estimated microseconds of a decode kernel and then XLA's dot, on an H100 (SXM)."""
    decode = n * k * (2.5 + 4 / 64) / 2.75e6 + 1
    return decode + max(2 * m * n * k / 770e6, 2 * n * k / 2.6e6) + 6
