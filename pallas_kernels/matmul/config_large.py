"""Tile choice of the matmul for many rows of x, and its time against decoding first."""

import dataclasses
import math

CLUSTER = 2  # blocks of 128 outputs, with the same rows of x
MOST_SHARES = 8  # of a tile
ROW_GROUP = 8  # tiles of rows that take their turn at a tile of outputs together


@dataclasses.dataclass(frozen=True)
class LargeTiles:
    """Tiles of `mosaic_large`, each of 128 outputs.

    Attributes:
        rows: rows of x of a tile, a multiple of 64 up to 256.
        slots: steps in flight.
        split: 0 gives each cluster of blocks whole tiles, 1 divides the work evenly, also inside
            tiles, and 2, 4 or 8 clusters, or as many as there are, share each tile.
    """

    rows: int = 256
    slots: int = 4
    split: int = 1


LARGE_TILES = (
    *(LargeTiles(256, 4, split) for split in (0, 1, 2, 4, 8)),
    *(LargeTiles(128, 7, split) for split in (0, 1, 2, 4, 8)),
)


@dataclasses.dataclass(frozen=True)
class Division:
    """How clusters divide tiles.

    Attributes:
        clusters: their number.
        shares: of a tile, each of another cluster.
        rounds: of a tile for each cluster.
        rest: tiles that these leave.
        splits: whether clusters share the rest evenly, also inside tiles.
    """

    clusters: int
    shares: int
    rounds: int
    rest: int
    splits: bool


def divide(tiles: LargeTiles, count: int, units: int, sms: int) -> Division:
    """Divide `count` tiles of `units`, which are not divided, among the clusters of a GPU."""
    most, shares = max(1, sms // CLUSTER), 1
    if tiles.split > 1:  # each share has a unit, and finishes 16 rows of x
        limit = min(tiles.split, MOST_SHARES, most // count, units, tiles.rows // 16)
        shares = 1 << max(limit, 1).bit_length() - 1
    evenly = tiles.split == 1
    clusters = min(most, count * (min(MOST_SHARES, units) if evenly else shares))
    rounds, rest = divmod(count, clusters)
    if evenly and rounds and 0 < 2 * rest < clusters:  # then no tile is in more than three shares
        rounds, rest = rounds - 1, rest + clusters
    return Division(clusters, shares, rounds, rest, evenly or shares > 1)


# Microseconds, by measurement on an H100 (SXM).
_STEP_US = {(256, False): 0.67, (256, True): 0.67, (128, False): 0.44, (128, True): 0.5}  # of 64
_TILE_US = {256: 2.1, 128: 2.9}  # by its rows of x
_LATER_TILE_US = {False: 0, True: 1.2}  # more for each tile but the first, in either direction
_LAUNCH_US = 2.3
_SUM_US = 8.2  # of another cluster's sum of a tile
_EXCHANGE_US, _MEGABYTE_US = 1.1, 0.55  # of an exchange of sums, and of their bytes


def _wait_for_x(m: int, contracted: int) -> float:
    """What part longer the steps of uneven shares take.

    Each is at its own place of the contraction: what they read of x has to be in the L2 cache.
    """
    megabytes = min(m, ROW_GROUP * 256) * contracted * 2 / 1e6
    return min(0.3, max(0, megabytes - 20) / 45)


def large_time(
    tiles: LargeTiles, m: int, outputs: int, contracted: int, transpose: bool, sms: int
) -> float:
    """Estimated microseconds of `mosaic_large`."""
    count = math.ceil(outputs / 256) * math.ceil(m / tiles.rows)
    units = math.ceil(contracted / 128)
    work = divide(tiles, count, units, sms)
    rest = math.ceil(work.rest * (units if work.splits else 1) / work.clusters)
    steps = 2 * (work.rounds * units + rest * (1 if work.splits else units))
    tile_us = _TILE_US[tiles.rows]
    if work.shares > 1:
        megabytes = work.clusters * CLUSTER * 512 * tiles.rows / 1e6 * (1 - 1 / work.shares)
        us = tile_us / work.shares + _EXCHANGE_US + megabytes * _MEGABYTE_US
    else:
        count = work.rounds + math.ceil(work.rest / work.clusters)  # of a cluster
        us = tile_us * count + _LATER_TILE_US[transpose] * (count - 1)
        if work.splits and work.rest:
            steps += 2 * rest * _wait_for_x(m, contracted)
            us += _SUM_US * max(1, math.ceil(work.clusters / work.rest) - 1)
    return _LAUNCH_US + steps * _STEP_US[tiles.rows, transpose] + us


def large_candidates(
    m: int, outputs: int, contracted: int, transpose: bool, sms: int
) -> list[LargeTiles]:
    """All tiles, the least estimated time first."""
    return sorted(LARGE_TILES, key=lambda t: large_time(t, m, outputs, contracted, transpose, sms))


def decoded_time(m: int, n: int, k: int) -> float:
    """Estimated microseconds of a decode kernel and then XLA's dot, on an H100 (SXM)."""
    decode = n * k * (2.5 + 4 / 64) / 2.75e6 + 1
    # At the rate of the tensor cores, of memory, or of one tile. Alone a dot reaches 805 TFLOP/s;
    # training steps of 8,192 and 16,384 rows say how much less it is among other kernels.
    dot = max(2 * m * n * k / 760e6, 2 * n * k / 2.6e6 + 6, k / 290)
    return decode + dot + 3
