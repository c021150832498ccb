"""The decoded weight as the left operand of wgmma, for `mosaic_large`: registers, not memory.

A step is 64 contracted elements of 128 outputs. A lane (group g = lane / 4, place q = lane % 4)
must hold, of each 16 contracted elements, the pairs from 2q and 2q + 8 in two of its warpgroup's 64
operand rows (PTX ISA, wgmma fragments). Packed bytes hold two elements along K, so the two
directions differ:

    Rows      contracted along K: a pair is a byte, and lane q takes byte q of each word of its rows
    Columns   contracted along N: a pair is a nibble of each of two weight rows; a transposed load
              of 8 x 8 matrices brings the two rows to one lane. A byte holds two operand rows.
"""

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels import mosaic_table as pair_table
from pallas_kernels.matmul.mosaic_codes import ACROSS_BYTES, ALONG_BYTES, Codes
from pallas_kernels.matmul.problem import Problem
from pallas_kernels.scales import SECOND_LEVEL_BLOCK

STEP = 64
OUTPUTS = 128
TABLE = 256  # entries of the second-level scale table
LINE = pair_table.WIDE  # bytes between rows of x where a result is staged, in gaps of that table


class Lane:
    """A multiplying thread's place: warpgroup 0 or 1, warp 0 to 3 in it, lane."""

    def __init__(self, thread: mg.Int):
        self.thread = thread
        self.warpgroup = thread >> 7
        warp, self.lane = mg.warp_and_lane(thread)
        self.warp = warp & 3
        self.group, self.quad = self.lane >> 2, self.lane & 3


class _Left:
    """What the directions share: the scales of a step."""

    permuted: tuple[int, ...]  # which of the 4 products of a step are decoded by permutation

    def __init__(self, problem: Problem):
        self.problem = problem
        self.span = min(problem.block_size, STEP)  # columns of a scale within a step
        self.scale_words = OUTPUTS * STEP // self.span

    def scales(self, thread: mg.Int, output0: mg.Int, step: mg.Int):
        """Row, column and place in shared memory of each scale that a copying thread brings."""
        raise NotImplementedError

    def load_scales(self, bases, layer, thread, output0, step) -> list:
        """What this thread's scales of a step are made of: a float, or (code, float)."""
        problem, out = self.problem, []
        for row, column, _ in self.scales(thread, output0, step):
            row = row.at_most(problem.n - 1)
            block = (column // problem.block_size).at_most(problem.blocks - 1)
            flat = (layer.wide() * problem.n + row.wide()) * problem.blocks + block.wide()
            if not problem.double:
                out.append(mem.load_float(bases[0] + (flat << 2)))
                continue
            _, absmax, _, _, origin = bases
            position = (row + mem.load_word(origin)) * problem.pitch
            position = position + mem.load_word(origin + 4) + block
            group = layer * problem.groups + position // SECOND_LEVEL_BLOCK
            out.append(mem.load_byte(bases[0] + flat).value)
            out.append(mem.load_float(absmax + (group << 2).wide()))
        return out

    def decode_scales(self, raw: list, table: mg.Int, offset) -> list:
        """The float32 scales of `load_scales`."""
        if not self.problem.double:
            return raw
        return [
            mg.mul_then_add(mem.load_float(table + (mg.Int(code) << 2)), absmax, offset)
            for code, absmax in zip(raw[0::2], raw[1::2], strict=True)
        ]


class Rows(_Left):
    """y.T = W @ x.T: operand rows are weight rows."""

    box = (OUTPUTS, STEP // 2)  # of packed bytes
    swizzle = 32
    permuted = (2,)

    def __init__(self, problem: Problem):
        super().__init__(problem)
        self.outputs, self.contracted = problem.n, problem.k

    def origin(self, output0: mg.Int, step: mg.Int) -> list[mg.Int]:
        """The weight row and packed column of a step."""
        return [output0, step * (STEP // 2)]

    def scales(self, thread, output0, step):
        """See `_Left`; a scale is stored as a pair, for its operand row."""
        return [
            (output0 + thread, step * STEP + first, (thread << 2) + 4 * OUTPUTS * i)
            for i, first in enumerate(range(0, STEP, self.span))
        ]

    def store_scale(self, address: mg.Int, scale) -> None:
        mem.store(address, mg.pack_pair(scale, scale, self.problem.dtype))

    def words(self, at: Lane, packed: mg.Int, scales: mg.Int, codes: Codes):
        """The operand of a step: 4 words for each 16 k."""
        row = (at.warpgroup << 6) + (at.warp << 4) + at.group
        packed, twist = packed + (row << 5), row >> 2 & 1  # the swizzle
        rows = []
        for start in (packed, packed + 8 * 32):
            chunks = [
                mem.load_words(start + (twist << 4)),
                mem.load_words(start + ((twist ^ 1) << 4)),
            ]
            rows.append(chunks[0] + chunks[1])
        upper, lower = rows
        scales = scales + (row << 2)
        starts = range(0, 4 * self.scale_words, 4 * OUTPUTS)
        pairs = [
            [mem.load_word(scales + start + 32 * half) for half in range(2)] for start in starts
        ]
        own_byte, two_bytes = pair_table.selector(at.quad), at.quad * 0x11 + 0x40
        a = []
        for i in range(4):
            two = [row[2 * i : 2 * i + 2] for row in (upper, lower)]
            if i in self.permuted:
                bytes_ = [mg.permute(*words, two_bytes) for words in two]
                u0, u1, l0, l1 = codes.permute(mg.permute(*bytes_, mg.Int(0x5410)), ALONG_BYTES)
            else:
                u0, u1, l0, l1 = (codes.look_up(word, own_byte) for words in two for word in words)
            upper_scale, lower_scale = pairs[16 * i // self.span]
            order = ((u0, upper_scale), (l0, lower_scale), (u1, upper_scale), (l1, lower_scale))
            a += [mg.mul_pairs(pair, scale, self.problem.dtype) for pair, scale in order]
        return a

    def stage(self, at: Lane, acc: list, staging: mg.Int) -> None:
        """Write up to 64 columns of the result to shared memory as rows of x."""
        matrix, line = at.lane >> 3, at.lane & 7
        chunk = ((at.warp << 1) + (matrix & 1)) ^ line
        base = staging + ((matrix >> 1 << 3) + line) * LINE + (chunk << 4)
        for column in range(0, 2 * len(acc), 16):
            values = acc[column // 2 :][:8]
            words = [
                mg.pack_pair(values[i], values[i + 1], self.problem.dtype) for i in (0, 2, 4, 6)
            ]
            mem.store_matrices_transposed(base + column * LINE, words)


class Columns(_Left):
    """dX.T = W.T @ dY.T: operand rows are weight columns.

    Row g of a warp is the high nibble of a byte, row g + 8 the low one. Two warps share the 32
    columns of a 16-byte row of a matrix, and take its even and its odd bytes.
    """

    box = (STEP, OUTPUTS // 2)
    swizzle = 64
    permuted = (1, 3)

    def __init__(self, problem: Problem):
        super().__init__(problem)
        self.outputs, self.contracted = problem.k, problem.n

    def origin(self, output0: mg.Int, step: mg.Int) -> list[mg.Int]:
        """The weight row and packed column of a step."""
        return [step * STEP, output0 // 2]

    def scales(self, thread, output0, step):
        """See `_Left`; a lane's 16 rows lie together, two in a word."""
        row = thread & 63
        place = (((row >> 1 & 3) << 3) + (row >> 3) << 2) + ((row & 1) << 1)
        out = []
        for i in range(STEP // self.span):
            block = (thread >> 6) * (STEP // self.span) + i
            out.append((step * STEP + row, output0 + block * self.span, place + (block << 7)))
        return out

    def store_scale(self, address: mg.Int, scale) -> None:
        mem.store(address, mg.round_to(scale, self.problem.dtype))

    def words(self, at: Lane, packed: mg.Int, scales: mg.Int, codes: Codes):
        """The operand of a step: 4 words for each 16 n."""
        chunk = (at.warpgroup << 1) + (at.warp >> 1)
        packed = packed + (at.lane << 6) + ((chunk ^ (at.lane >> 1 & 3)) << 4)
        pairs = mem.load_matrices_transposed(packed)
        pairs += mem.load_matrices_transposed(packed + 32 * 64)
        block = at.warpgroup if self.span == STEP else chunk
        scales = scales + (block << 7) + (at.quad << 5)
        scales = mem.load_words(scales) + mem.load_words(scales + 16)
        odd = at.warp & 1
        own_bytes = pair_table.selector(odd), pair_table.selector(odd + 2)  # of two weight rows
        a = []
        for i in range(4):
            two = pairs[2 * i : 2 * i + 2]
            if i in self.permuted:
                word = mg.permute(*two, odd * 0x1111 + 0x6420)
                values = codes.permute(word, ACROSS_BYTES)
            else:
                rows = [[codes.look_up(word, byte) for byte in own_bytes] for word in two]
                values = [mg.permute(*r, mg.Int(half)) for r in rows for half in (0x5410, 0x7632)]
            for j, value in enumerate(values):
                a.append(mg.mul_pairs(value, scales[2 * i + j // 2], self.problem.dtype))
        return a

    def stage(self, at: Lane, acc: list, staging: mg.Int) -> None:
        """Write up to 64 columns of the result to shared memory as rows of x."""
        chunk = (at.warp >> 1 << 2) + (at.group >> 1)
        place = ((at.group & 1) << 3) + ((at.warp & 1) << 2)
        for column in range(0, 2 * len(acc), 8):
            values = acc[column // 2 :][:4]
            for i in range(2):
                line = (at.quad << 1) + i
                target = staging + (line + column) * LINE + ((chunk ^ line) << 4) + place
                mem.store(target, mg.pack_pair(values[i], values[i + 2], self.problem.dtype))
