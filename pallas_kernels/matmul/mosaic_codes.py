"""Codes of packed bytes in `mosaic_large`, as pairs: by a table in shared memory, by permutations.

A lookup is two instructions for two weights, but takes a cycle of shared memory, which the tensor
cores and the copies of x fill to nine tenths. A permutation takes none and twice the instructions.
Each step is decoded in both ways, in the parts that measured fastest.
"""

import jax
from jax.extend.mlir import ir

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_table as pair_table

# Pairs of `Codes.permute`: neighbours in a byte (the high nibble comes first along K), or the same
# place in two bytes.
ALONG_BYTES = (0x4051, 0x6273)
ACROSS_BYTES = (0x7351, 0x6240)


class Codes:
    """One thread's view of a codebook, whose entry of `code` each lane has (`load_code`)."""

    def __init__(self, table: mg.Int, code: ir.Value, dtype: jax.typing.DTypeLike, warps: int):
        """By the first `warps` of the block, which the caller synchronizes."""
        pair_table.build(table, code, dtype, warps, pair_table.WIDE)
        self.table, self.lane_offset = table, (mg.thread_index() & 31) << 2
        # From the half of the warp that a lane is in: what ptxas knows to be the same in all lanes,
        # it keeps in uniform registers, to move at each use.
        half = mg.thread_index() & 16
        codes = [mg.shuffle(code, half + i) for i in range(16)]
        pairs = [mg.pack_pair(*codes[i : i + 2], dtype) for i in range(0, 16, 2)]
        self.high_bytes, self.low_bytes = (
            [mg.permute(*pairs[i : i + 2], mg.Int(selector)) for i in range(0, 8, 2)]
            for selector in (0x7531, 0x6420)
        )

    def look_up(self, word: mg.Int, selector: mg.Int) -> mg.Int:
        """The 2 codes of the byte that `mosaic_table.selector` was given."""
        return pair_table.lookup(word, selector, self.table, self.lane_offset)

    def permute(self, word: mg.Int, pairing: tuple[int, int]) -> list[mg.Int]:
        """The 8 codes of a word as 4 pairs: 2 of each half of the word.

        A permutation selects by 3 bits of each nibble out of 8 bytes, so two of them and the
        nibble's top bit find one of 16.
        """
        index = word & 0x77777777
        choose = mg.and_or(word >> 1, mg.Int(0x44444444), mg.Int(0x32103210))
        pairs = []
        for shift in (0, 16):
            low_bits, top_bits = index >> shift, choose >> shift
            high, low = (
                mg.permute(
                    mg.permute(*bytes_[:2], low_bits), mg.permute(*bytes_[2:], low_bits), top_bits
                )
                for bytes_ in (self.high_bytes, self.low_bytes)
            )
            pairs += [mg.permute(low, high, mg.Int(selector)) for selector in pairing]
        return pairs
