"""The pair table of the Mosaic GPU kernels: a packed byte -> its two codes, 16 bits each."""

import jax
from jax.extend.mlir import ir

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem

WORDS = 256 * mg.WARP


def load_code(codebook: mg.Int) -> ir.Value:
    """This lane's entry of a codebook [16], for `build`; loaded early, used late."""
    return mem.load_float(codebook + ((mg.thread_index() & 15) << 2).wide())


def build(table: mg.Int, code: ir.Value, dtype: jax.typing.DTypeLike, warps: int) -> None:
    """Fill the 32 KB table; the caller synchronizes the block.

    Entry e is copied once for each lane (at 128 e + 4 lane), so that no lookup has a bank conflict.
    The high nibble, which comes first along K, is the low half of the pair.
    """
    warp, lane = mg.warp_and_lane(mg.thread_index())
    for first in range(0, 256, warps):
        entry = warp + first
        pair = mg.pack_pair(mg.shuffle(code, entry >> 4), mg.shuffle(code, entry & 15), dtype)
        target = table + (entry << 7) + (lane << 2)
        if first + warps <= 256:
            mem.store(target, pair)
        else:
            with mg.when(entry < 256):
                mem.store(target, pair)


def decode_word(word: mg.Int, table: mg.Int, lane_offset: mg.Int) -> list[mg.Int]:
    """The 8 codes of a packed word as 4 pairs, in the order of K; `lane_offset` is 4 lane."""
    shifted = [word << 7, word >> 1, word >> 9, word >> 17]
    return [mem.load_word(mg.and_or(s, mg.Int(0x7F80), lane_offset) + table) for s in shifted]


def decode_bytes(
    words: list[mg.Int], own: mg.Int, table: mg.Int, lane_offset: mg.Int
) -> list[mg.Int]:
    """The pair of codes of one byte of each word, that from bit `own` on."""
    turned = [mg.rotate_right(word, own + (32 - 7)) for word in words]
    return [mem.load_word(mg.and_or(t, mg.Int(0x7F80), lane_offset) + table) for t in turned]
