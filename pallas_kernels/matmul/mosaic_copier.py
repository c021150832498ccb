"""The copying warpgroup of `mosaic_large`: brings packed bytes, x and scales of each step."""

from jax.extend.mlir import ir

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels.matmul.large_layout import MULTIPLYING, Layout, Share
from pallas_kernels.matmul.mosaic_left import STEP, TABLE
from pallas_kernels.matmul.mosaic_ring import Ring
from pallas_kernels.matmul.problem import Operands

GROUP = 4  # steps whose scales are loaded together


def layer_of(layout: Layout, refs: Operands) -> mg.Int:
    """The layer of a stack that is multiplied."""
    if not layout.problem.stacked:
        return mg.Int(0)
    return mem.load_word(mem.global_address(refs.layer))


def copy_table(layout: Layout, refs: Operands, table: mg.Int) -> None:
    """By the block, at its start: the table of double-quantized scales."""
    source = mem.global_address(refs.scales[3])
    if layout.problem.stacked_table:
        source = source + layer_of(layout, refs).wide() * (4 * TABLE)
    with mg.when(mg.thread_index() < TABLE):
        place = mg.thread_index() << 2
        mem.store(table + place, mem.load_float(source + place.wide()))


class Copier:
    """One thread's view of it. `scratch` are the block's references, as of `Layout.scratch`."""

    def __init__(
        self, context, layout: Layout, share: Share, ring: Ring, refs: Operands, scratch: dict
    ):
        self.context, self.layout, self.share, self.ring = context, layout, share, ring
        self.problem, self.left = layout.problem, layout.left
        self.refs, self.scratch = refs, scratch
        self.scales, self.table = (mem.shared_address(scratch[n]) for n in ("scales", "table"))
        self.thread = mg.thread_index() - MULTIPLYING
        self.layer = layer_of(layout, refs)
        self.bases = [mem.global_address(ref) for ref in refs.scales]
        self.offset = None
        if self.problem.double:
            self.offset = mem.load_float(self.bases[2] + (self.layer << 2).wide())

    def run(self) -> None:
        """Fill the slots with the steps of the share."""
        steps = self.share.steps
        mg.loop(steps.at_most(self.ring.slots), [], lambda p, _: self._copy(p) or [])
        # Scales are loaded a group ahead: no step waits for device memory.
        groups = (steps + (GROUP - 1)) // GROUP
        mg.loop(groups, self._load_group(mg.Int(0)), self._fill_group)

    def _copy(self, p: mg.Int) -> None:
        """Start the copies of a step."""
        with mg.when(self.thread.equals(0)):
            output0, row0, step = self.share.place(p)
            slot = p % self.ring.slots
            barrier = self.ring.barriers.reference(slot)
            lead = [self.layer] if self.problem.stacked else []
            for name, start, swizzle in (
                ("x", [row0, step * STEP], 128),
                ("packed", [*lead, *self.left.origin(output0, step)], self.left.swizzle),
            ):
                source, shape = getattr(self.refs, name), self.layout.scratch()[name].shape[1:]
                target = mem.element(self.scratch[name], slot)
                shared = name == "x"  # by the blocks of the cluster
                mem.copy_tensor(
                    self.context, source, target, start, shape, barrier, swizzle, shared
                )

    def _load_group(self, first: mg.Int) -> list:
        return [value for i in range(GROUP) for value in self._load(first + i)]

    def _load(self, p: mg.Int) -> list:
        output0, _, step = self.share.place(p.at_most(self.share.steps - 1))
        return self.left.load_scales(self.bases, self.layer, self.thread, output0, step)

    def _fill_group(self, i: mg.Int, raw: list[ir.Value]) -> list[ir.Value]:
        first = i * GROUP
        upcoming, each = self._load_group(first + GROUP), len(raw) // GROUP
        for j in range(GROUP):
            with mg.when(first + j < self.share.steps):
                self._fill(first + j, raw[j * each : (j + 1) * each])
        return upcoming

    def _fill(self, p: mg.Int, raw: list[ir.Value]) -> None:
        """Fill a slot: the copies of the first slots are under way."""
        slots = self.ring.slots
        with mg.when(mg.Int(slots - 1) < p):
            self.ring.wait_free(p)
            self._copy(p)
        output0, _, step = self.share.place(p)
        target = self.scales + p % slots * (4 * self.left.scale_words)
        values = self.left.decode_scales(raw, self.table, self.offset)
        places = self.left.scales(self.thread, output0, step)
        for (_, _, place), value in zip(places, values, strict=True):
            self.left.store_scale(target + place, value)
        self.ring.fill(p)
