"""The pair table of the Mosaic GPU kernels: a packed byte -> its two codes, 16 bits each.

Entry e is there once for each lane, at `pitch` e + 4 lane, so that no lookup has a bank conflict.
The high nibble, which comes first along K, is the low half of a pair. At a pitch of 128 bytes the
table takes 32 KB. At `WIDE` it takes 64 KB, every other 128 bytes of which are free, and an address
is one permutation.
"""

import contextlib

import jax
from jax.extend.mlir import ir

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem

WORDS = 256 * mg.WARP
PITCH, WIDE = 128, 256  # bytes


def load_code(codebook: mg.Int) -> ir.Value:
    """This lane's entry of a codebook [16], for `build`; loaded early, used late."""
    return mem.load_float(codebook + ((mg.thread_index() & 15) << 2).wide())


def build(
    table: mg.Int, code: ir.Value, dtype: jax.typing.DTypeLike, warps: int, pitch: int = PITCH
) -> None:
    """By the first `warps` of the block, which the caller synchronizes: fill the table."""
    warp, lane = mg.warp_and_lane(mg.thread_index())
    for first in range(0, 256, 4 * warps):  # 4 entries a warp, 16 bytes a lane
        entry = (warp << 2) + (lane >> 3) + first
        pair = mg.pack_pair(mg.shuffle(code, entry >> 4 & 15), mg.shuffle(code, entry & 15), dtype)
        target = table + entry * pitch + ((lane & 7) << 4)
        with mg.when(entry < 256) if first + 4 * warps > 256 else contextlib.nullcontext():
            mem.store_words(target, [pair] * 4)


def decode_word(word: mg.Int, table: mg.Int, lane_offset: mg.Int) -> list[mg.Int]:
    """The 8 codes of a packed word as 4 pairs, in the order of K; `lane_offset` is 4 lane."""
    shifted = [word << 7, word >> 1, word >> 9, word >> 17]
    return [mem.load_word(mg.and_or(s, mg.Int(0x7F80), lane_offset) + table) for s in shifted]


def selector(byte: mg.Int) -> mg.Int:
    """What `lookup` needs to know of a byte's number in its word."""
    return (byte << 4) + 0x5504


def lookup(
    word: mg.Int, selector: mg.Int, table: mg.Int, lane_offset: mg.Int, pitch: int = WIDE
) -> mg.Int:
    """The 2 codes of a byte as a pair, from a table of either pitch; `lane_offset` is 4 lane."""
    if pitch == WIDE:
        return mem.load_word(mg.permute(word, lane_offset, selector) + table)
    return mem.load_word((mg.permute(word, lane_offset << 1, selector) >> 1) + table)
