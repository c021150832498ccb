"""Tiles measured to be the best, by device kind; `benchmarks/NOTES.md` has the times.

A key is (M, N, K), with M the largest of a range that starts above the one before in `_BUCKETS`.
"""

from pallas_kernels.matmul.config import DecodeTiles, MidTiles

_BUCKETS = (1, 4, 8, 16, 32, 64, 128)

_H100 = {
    (1, 14336, 4096): DecodeTiles(16, 1, 2),
    (4, 14336, 4096): DecodeTiles(16, 1, 2),
    (8, 14336, 4096): DecodeTiles(16, 1, 2),
    (16, 14336, 4096): MidTiles(112, 2, 2, 256),
    (32, 14336, 4096): MidTiles(112, 2, 2, 256),
    (64, 14336, 4096): MidTiles(112, 2, 2, 128),
    (32, 4096, 4096): MidTiles(128, 2, 2, 128, teams=4, cluster=True),
    (64, 4096, 4096): MidTiles(128, 2, 2, 64, teams=4, cluster=True),
    (1, 4096, 14336): DecodeTiles(8, 1, 3, shared_x=True),
    (4, 4096, 14336): DecodeTiles(8, 1, 3, shared_x=True),
    (16, 4096, 14336): MidTiles(128, 2, 2, 128, teams=4, cluster=True),
    (32, 4096, 14336): MidTiles(128, 2, 2, 128, teams=4, cluster=True),
    (64, 4096, 14336): MidTiles(128, 2, 2, 128),
    (4, 8192, 28672): DecodeTiles(8, 2, 3, shared_x=True),
    (32, 2560, 9728): MidTiles(80, 2, 2, 256, cluster=True),
    (32, 2048, 1024): MidTiles(64, 2, 2, 128, teams=4, cluster=True),
}

TABLE: dict[str, dict[tuple[int, int, int], DecodeTiles | MidTiles]] = {
    "NVIDIA H100 80GB HBM3": _H100,
}


def lookup(kind: str, m: int, n: int, k: int) -> DecodeTiles | MidTiles | None:
    """The measured tiles of a device kind and shape, or None."""
    bucket = next((b for b in _BUCKETS if m <= b), m)
    return TABLE.get(kind, {}).get((bucket, n, k))
