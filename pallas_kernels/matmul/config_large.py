"""Tile choice of the matmul for many rows of x, and its time against decoding first."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class LargeTiles:
    """Tiles of `mosaic_large`.

    Attributes:
        outputs: outputs of a block's tile, 64 or 128.
        rows: rows of x of a tile, 128 or 256.
        slots: steps in flight, a multiple of `decoders`.
        decoders: warpgroups that decode.
        registers: a thread's registers when multiplying and when decoding; None leaves the split
            to the launch.
        group: steps whose scales a decoder loads together; `group * decoders` is at most 8.
    """

    outputs: int = 128
    rows: int = 256
    slots: int = 4
    decoders: int = 1
    registers: tuple[int, int] | None = (200, 104)
    group: int = 4


# Microseconds of a step of 64 along the contraction, by measurement on an H100 (SXM).
LARGE_STEP_US = {
    LargeTiles(128, 256, 4, 1, (200, 104)): 0.86,
    LargeTiles(64, 256, 4, 2, None): 0.45,
    LargeTiles(64, 128, 6, 2, None): 0.40,
}
_LARGE_TILE_US = 2.0  # a tile beside its steps: filling the ring, writing the result
_TRANSPOSED = 1.1  # every step of the transposed product has scales of other rows


def large_time(
    tiles: LargeTiles, m: int, outputs: int, contracted: int, sms: int, transpose: bool = False
) -> float:
    """Estimated microseconds of `mosaic_large`."""
    waves = math.ceil(math.ceil(outputs / tiles.outputs) * math.ceil(m / tiles.rows) / sms)
    step = LARGE_STEP_US[tiles] * (_TRANSPOSED if transpose else 1)
    return waves * (contracted / 64 * step + _LARGE_TILE_US)


def choose_large(m: int, outputs: int, contracted: int, sms: int) -> LargeTiles:
    """The tiles of the least estimated time; `outputs` is a multiple of 64."""
    tiles = [t for t in LARGE_STEP_US if outputs % t.outputs == 0]
    return min(tiles, key=lambda t: large_time(t, m, outputs, contracted, sms))


def decoded_time(m: int, n: int, k: int) -> float:
    """Estimated microseconds of a decode kernel and then XLA's dot, on an H100 (SXM)."""
    # XLA's dot of a small weight (4096 x 4096) is slow until there are many rows.
    rate = 600e6 if n * k <= 2**25 and m < 8192 else 780e6
    return n * k * (2.5 + 4 / 64) / 2.75e6 + 2 + 2 * m * n * k / rate
