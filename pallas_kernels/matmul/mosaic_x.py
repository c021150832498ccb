"""x in shared memory as wgmma's right operand, for `mosaic_mid`: a ring that a team of warps reads.

A part of x is some boxes of all its rows and 64 k, 128 bytes of each row, swizzled. One thread
starts the copies; the warps of the team take turns to refill the ring. Past the end of x the copies
give zeros.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels.matmul.problem import Problem

BOX = 64  # k
SWIZZLE = 2 * BOX


@dataclasses.dataclass(frozen=True)
class XLayout:
    """Shared memory of the rings of some teams of warps: `stages` parts of `depth` k each."""

    problem: Problem
    teams: int
    warps: int
    stages: int
    depth: int

    @property
    def columns(self) -> int:
        """Rows of x, rounded up to 8: the columns of the right operand."""
        return -(-self.problem.m // 8) * 8

    @property
    def boxes(self) -> int:
        """Boxes of a part."""
        return self.depth // BOX

    def scratch(self, least: int) -> dict:
        """What to allocate, by name; at least so many bytes for x, used for others after it."""
        places = self.teams * self.stages
        boxes = max(places * self.boxes, -(-least // (self.columns * SWIZZLE)))
        return {
            "x": plgpu.SMEM((boxes, self.columns, BOX), jnp.dtype(self.problem.dtype)),
            "x_barriers": plgpu.SMEM((4 * places,), jnp.int32),
        }


class XRing:
    """One thread's view of its team's ring.

    All warps of the team, for each part in turn: `wait`, use `operand`, `leave`, `refill`.
    """

    def __init__(self, context, layout: XLayout, team: mg.Int, warp: mg.Int, x, scratch: dict):
        """Take the team, the warp in it and the reference of x [M, K]."""
        self.context, self.layout, self.source, self.warp = context, layout, x, warp
        self.target, self.first = scratch["x"], team * (layout.stages * layout.boxes)
        self.base = mem.shared_address(self.target)
        self.box_bytes = layout.columns * SWIZZLE
        # Of each place: when it is full, then when all have left it.
        count = 2 * layout.stages
        self.barriers = mem.Barriers(scratch["x_barriers"], count, team * count)

    def initialize(self) -> None:
        """By one thread of the team; the others synchronize with it."""
        self.barriers.initialize(self.layout.boxes, [self.layout.warps] * self.layout.stages)

    def _box(self, part: mg.Int, box: int) -> mg.Int:
        """The number of a part's box in shared memory."""
        return self.first + part % self.layout.stages * self.layout.boxes + box

    def copy(self, part: mg.Int, k: mg.Int) -> None:
        """By one thread: start to copy a part, from k on."""
        barrier = self.barriers.reference(part % self.layout.stages)
        for box in range(self.layout.boxes):
            place, target = (
                [mg.Int(0), k + box * BOX],
                mem.element(self.target, self._box(part, box)),
            )
            shape = self.layout.columns, BOX
            mem.copy_tensor(self.context, self.source, target, place, shape, barrier, SWIZZLE)

    def wait(self, part: mg.Int) -> mg.Int:
        """Wait until a part is there; its address, for `operand`."""
        stages = self.layout.stages
        self.barriers.wait(part % stages, part // stages & 1)
        return self.base + self._box(part, 0) * self.box_bytes

    def operand(self, start: mg.Int, k: int) -> mg.Int:
        """The descriptor of the right operand from k of a part on; 16 k are 32 bytes."""
        return mg.swizzled_descriptor(start + (k // BOX * self.box_bytes + k % BOX * 2))

    def leave(self, part: mg.Int) -> None:
        """Leave a part of x; `refill` must follow, at once or later."""
        mg.sync_warp()
        with mg.when((mg.thread_index() & 31).equals(0)):
            self.barriers.arrive(part % self.layout.stages + self.layout.stages)

    def refill(self, part: mg.Int, count: mg.Int, k_of: Callable[[mg.Int], mg.Int]) -> None:
        """Refill, by a warp in turn, the place of one that all have left, after a part is left.

        With 3 stages or more that is the place of the part before, so that nobody waits. With 2 it
        is this part's: the next must be on its way before anyone waits for it. `count` are the
        team's parts, and `k_of` gives the first k of one.
        """
        stages, lag = self.layout.stages, min(1, self.layout.stages - 2)
        turn = self.warp.equals(part % self.layout.warps)
        wanted = mg.both(part + (stages - lag) < count, mg.Int(lag) < part + 1)
        first_lane = (mg.thread_index() & 31).equals(0)
        with mg.when(mg.both(mg.both(turn, wanted), first_lane)):
            left = part - lag
            self.barriers.wait(left % stages + stages, left // stages & 1)
            self.copy(left + stages, k_of(left + stages))
