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


# Microseconds of a step of 64 along the contraction, by measurement on an H100 (SXM).
LARGE_STEP_US = {
    LargeTiles(256, 5, 8): 0.70,
    LargeTiles(256, 5, 0): 0.70,
    LargeTiles(128, 6, 8): 0.40,
    LargeTiles(192, 5, 8): 0.55,
}
_LARGE_TILE_US = 2.0  # a tile beside its steps: filling the ring, writing the result


def large_time(tiles: LargeTiles, m: int, outputs: int, contracted: int, sms: int) -> float:
    """Estimated microseconds of `mosaic_large`."""
    waves = math.ceil(math.ceil(outputs / 128) * math.ceil(m / tiles.rows) / sms)
    return waves * (contracted / 64 * LARGE_STEP_US[tiles] + _LARGE_TILE_US)


def choose_large(m: int, outputs: int, contracted: int, sms: int) -> LargeTiles:
    """The tiles of the least estimated time."""
    return min(LARGE_STEP_US, key=lambda t: large_time(t, m, outputs, contracted, sms))


def decoded_time(m: int, n: int, k: int) -> float:
    """Estimated microseconds of a decode kernel and then XLA's dot, on an H100 (SXM)."""
    # XLA's dot of a small weight (4096 x 4096) is slow until there are many rows.
    rate = 600e6 if n * k <= 2**25 and m < 8192 else 780e6
    return n * k * (2.5 + 4 / 64) / 2.75e6 + 2 + 2 * m * n * k / rate
