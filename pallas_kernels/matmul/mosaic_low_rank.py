"""The term of an adapter, hidden @ B.T, in the sums of `mosaic_mid`.

For 16 weight rows it is one mma step for each 16 of the rank, whose fragments are few enough to
come from global memory: B [N, rank] is the left operand as a decoded weight is, hidden the right.
"""

import math

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels.matmul.problem import Operands, Problem

STEP = 16  # of the rank, in an mma
Steps = list[tuple[mg.Int, mg.Value]]  # and whether each is wanted


def section(problem: Problem, row: mg.Int) -> mg.Int:
    """Which of several layers side by side a row of the weight belongs to."""
    index, end = mg.Int(0), 0
    for size in problem.sections[:-1]:
        end += size
        index = index + mg.select(row < end, mg.Int(0), 1)
    return index


class LowRank:
    """One thread's view of an adapter."""

    def __init__(self, problem: Problem, refs: Operands, layer: mg.Int):
        self.problem, self.lane = problem, mg.thread_index() & (mg.WARP - 1)
        self.hidden, self.b = (mem.global_address(refs.adapter[i]) for i in range(2))
        self.b = self.b + layer.wide() * (2 * problem.n * problem.rank)

    def steps(self, wanted: mg.Value) -> Steps:
        """All steps, as far as `wanted`."""
        return [(mg.Int(i), wanted) for i in range(math.ceil(self.problem.rank / STEP))]

    def load(self, row: mg.Int, steps: Steps, columns: int) -> list[mg.Value]:
        """Start to load the fragments of 16 rows: 4 words of B, then 2 for each 8 of M, a step.

        `row` is the first of the 16. The words are for `add` alone: to look at one is to wait.
        """
        p, group = self.problem, self.lane >> 2
        first, pitch = section(p, row) * p.rank, len(p.sections) * p.rank
        rows = [(row + group + offset).at_most(p.n - 1) * p.rank for offset in (0, 8)]
        hidden = [(group + 8 * c).at_most(p.m - 1) * pitch + first for c in range(columns)]
        words = []
        for step in steps:
            for source, starts in ((self.b, rows), *((self.hidden, [h]) for h in hidden)):
                for k, exists in self.halves(*step):
                    for start in starts:
                        offset = mg.select(exists, start + k, 0)
                        words.append(mem.load_word(source + (offset << 1).wide()).value)
        return words

    def halves(self, step: mg.Int, wanted: mg.Value) -> list[tuple[mg.Int, mg.Value]]:
        """This lane's two places of a step in the rank, and whether they exist."""
        first = step * STEP + ((self.lane & 3) << 1)
        return [(k, mg.both(wanted, k < self.problem.rank)) for k in (first, first + 8)]

    def add(self, words: list[mg.Value], steps: Steps, acc: list[list]) -> None:
        """Add the products of what was loaded to `acc`: 4 floats for each 8 of M."""
        words = [mg.Int(word) for word in words]
        for step in steps:
            exists = [exists for _, exists in self.halves(*step)]

            def take(count: int, exists=exists) -> list[mg.Int]:
                taken, words[:] = words[: 2 * count], words[2 * count :]
                return [mg.select(exists[i // count], word, 0) for i, word in enumerate(taken)]

            b = take(2)
            for total in acc:
                total[:] = mg.mma(total, b, take(1), self.problem.dtype)
