"""Tile choice of the matmul for many rows of x, and its time against decoding first."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class LargeTiles:
    """Tiles of `mosaic_large`, each of 128 outputs.

    Attributes:
        rows: rows of x of a tile, a multiple of 64 up to 256.
        slots: steps in flight.
        split: clusters of blocks for a tile, at most; 0 gives each whole tiles.
    """

    rows: int = 256
    slots: int = 4
    split: int = 2


LARGE_TILES = (
    LargeTiles(256, 4, 0),
    LargeTiles(256, 4, 2),
    LargeTiles(256, 4, 4),
    LargeTiles(128, 7, 0),
    LargeTiles(128, 7, 2),
    LargeTiles(128, 7, 4),
)
# Microseconds, by measurement on an H100 (SXM) by the tile's rows of x: of a step of 64; of storing
# a tile, or a share of one; of adding sums, and of each. And of a launch.
_STEP_US = {256: 0.675, 128: 0.45}
_TILE_US = {256: 1.9, 128: 1.5}
_SUMS_US = {256: (2.0, 2.6), 128: (1.5, 1.5)}
_LAUNCH_US = 2.1


def _slowdown(m: int, even: bool) -> float:
    """How much longer a step takes than of few rows of x."""
    # Uneven shares are at different places of the contraction: they share less of the L2 cache.
    if m > 4096:
        return 1.07 if even else 1.25
    if m > 2048:
        return 1.03 if even else 1.25
    return 1.1 if m > 1024 and not even else 1.0


def large_time(tiles: LargeTiles, m: int, outputs: int, contracted: int, sms: int) -> float:
    """Estimated microseconds of `mosaic_large`."""
    count = math.ceil(outputs / 256) * math.ceil(m / tiles.rows)  # of tiles, each of a cluster
    clusters = min(sms // 2, count * max(1, tiles.split))
    share = count / clusters if tiles.split else math.ceil(count / clusters)
    begun, sums = math.ceil(share), 0
    if clusters > count:  # of a tile: the head adds the others
        sums = math.ceil(clusters / count) - (clusters % count == 0)
    elif share % 1:
        begun, sums = begun + 1, 1
    step = _STEP_US[tiles.rows] * _slowdown(m, share % 1 == 0)
    steps = share * 2 * math.ceil(contracted / 128)
    first, each = _SUMS_US[tiles.rows] if sums else (0, 0)
    return _LAUNCH_US + steps * step + begun * _TILE_US[tiles.rows] + first + sums * each


def choose_large(m: int, outputs: int, contracted: int, sms: int) -> LargeTiles:
    """The tiles of the least estimated time."""
    return min(LARGE_TILES, key=lambda t: large_time(t, m, outputs, contracted, sms))


def decoded_time(m: int, n: int, k: int) -> float:
    """Estimated microseconds of a decode kernel and then XLA's dot, on an H100 (SXM)."""
    decode = n * k * (2.5 + 4 / 64) / 2.75e6 + 1
    dot = max(2 * m * n * k / 800e6, 2 * n * k / 2.6e6 + 6)
    return decode + dot + 3
