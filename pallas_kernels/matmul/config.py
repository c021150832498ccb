"""Tile choice of the matmul kernels: what can be chosen, and a heuristic for shapes not measured."""

import dataclasses
import math

DECODE_PANEL = 256  # k of a warp's step in `mosaic_decode`
_BYTES_PER_US = 22_700  # of one SM when all of them stream: 3.0 TB/s over 132
_TILE_US = 0.1  # a tile's cost beside its bytes: barriers and the sum over warps
_SUM_US = 1.3  # the kernel that sums slabs


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
    stages: int = 3


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
    """

    outputs: int = 128
    rows: int = 256
    slots: int = 4
    decoders: int = 1
    registers: tuple[int, int] | None = (208, 88)


def decode_fits(m: int, panels: int, tiles: DecodeTiles) -> bool:
    """Whether the fragments of x fit in registers: 32 for 8 rows of x and a panel."""
    fragments = math.ceil(m / 8) * math.ceil(panels / tiles.slabs / tiles.warps)
    return fragments <= (4 if tiles.warps <= 8 else 2 if tiles.warps <= 16 else 1)


def choose_decode(m: int, n: int, k: int, block_size: int, sms: int) -> DecodeTiles:
    """The cheapest tiles by a model of bytes over bandwidth."""
    panels, row_tiles = math.ceil(k / DECODE_PANEL), math.ceil(n / 16)

    def cost(tiles: DecodeTiles) -> tuple[float, int]:  # ties go to 16 warps: 4 for each scheduler
        slab = math.ceil(panels / tiles.slabs)
        size = slab * DECODE_PANEL * 16 * (0.5 + 4 / block_size)
        waves = math.ceil(row_tiles / (sms // tiles.slabs))
        idle = math.ceil(slab / tiles.warps) * tiles.warps / slab - 1  # warps that wait for others
        time = waves * (size / _BYTES_PER_US * (1 + idle / 4) + _TILE_US)
        return time + (_SUM_US if tiles.slabs > 1 else 0), abs(tiles.warps - 16)

    candidates = [
        DecodeTiles(warps, slabs)
        for warps in (4, 8, 12, 16, 28)
        for slabs in range(1, min(panels, sms // 2) + 1)
        if decode_fits(m, panels, DecodeTiles(warps, slabs))
    ]
    best = min(candidates, key=cost)
    slot = 16 * (math.ceil(panels / best.slabs) * DECODE_PANEL // 2 + 16)
    return dataclasses.replace(best, stages=2 if slot > 24 * 1024 else 3)


@dataclasses.dataclass(frozen=True)
class MidTiles:
    """Tiles of `mosaic_mid`.

    Attributes:
        slabs: parts of K in different blocks, summed by a second kernel when there are several.
        stages: stages of 256 k in flight in a block.
        window: k whose scales are decoded at once, a multiple of 256.
    """

    slabs: int = 1
    stages: int = 3
    window: int = 2048


def choose_mid(m: int, n: int, k: int, block_size: int, sms: int) -> MidTiles:
    """Fill the SMs once if K has the stages for it."""
    row_tiles, steps = math.ceil(n / 128), math.ceil(k / 256)

    def cost(slabs: int) -> float:
        waves = math.ceil(row_tiles * slabs / sms)
        return waves * (math.ceil(steps / slabs) * (0.25 + m / 128) + 2) + (1.3 if slabs > 1 else 0)

    slabs = min(range(1, min(steps, 16) + 1), key=cost)
    stages = 5 if m <= 16 else 4 if m <= 32 else 3 if m <= 64 else 2
    window = min(2048 if m <= 96 else 1024, 32 * block_size)
    return MidTiles(slabs, stages, max(256, window))


# Microseconds of a step of 64 along the contraction, by measurement on an H100 (SXM).
LARGE_STEP_US = {
    LargeTiles(128, 256, 4, 1, (208, 88)): 0.86,
    LargeTiles(64, 256, 4, 2, None): 0.45,
    LargeTiles(64, 128, 6, 2, None): 0.40,
}
_LARGE_TILE_US = 2.0  # a tile beside its steps: filling the ring, writing the result


def large_time(tiles: LargeTiles, m: int, outputs: int, contracted: int, sms: int) -> float:
    """Estimated microseconds of `mosaic_large`."""
    waves = math.ceil(math.ceil(outputs / tiles.outputs) * math.ceil(m / tiles.rows) / sms)
    return waves * (contracted / 64 * LARGE_STEP_US[tiles] + _LARGE_TILE_US)


def choose_large(m: int, outputs: int, contracted: int, sms: int) -> LargeTiles:
    """The tiles of the least estimated time; `outputs` is a multiple of 64."""
    tiles = [t for t in LARGE_STEP_US if outputs % t.outputs == 0]
    return min(tiles, key=lambda t: large_time(t, m, outputs, contracted, sms))


def decoded_time(m: int, n: int, k: int) -> float:
    """Estimated microseconds of a decode kernel and then XLA's dot, on an H100 (SXM)."""
    # XLA's choice of a dot kernel is poorer for small weights.
    rate = 780e6 if n * k > 2**25 else 650e6
    return n * k * (2.5 + 4 / 64) / 2.75e6 + 2 + 2 * m * n * k / rate
