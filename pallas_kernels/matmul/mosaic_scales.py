"""Block scales inside a Mosaic kernel: fetched early as raw registers, decoded when they have arrived."""

from jaxlib.mlir import ir

from pallas_kernels import mosaic as mg
from pallas_kernels.matmul.problem import Problem
from pallas_kernels.scales import SECOND_LEVEL_BLOCK


class ScaleReader:
    """Reads scales of one weight (or of slice `layer` of a stack); `refs` are `Operands.scales`."""

    def __init__(self, problem: Problem, refs: list[ir.Value], layer: mg.Int):
        self.problem = problem
        bases = [mg.global_address(ref) for ref in refs]
        itemsize = 1 if problem.double else 4
        row_bytes = problem.blocks * itemsize
        self.scales = bases[0] + layer.wide() * (problem.n * row_bytes)
        if problem.double:
            _, absmax, offset, table, origin = bases
            self.absmax = absmax + layer.wide() * (4 * problem.groups)
            self.table = table + layer.wide() * 1024 if problem.stacked_table else table
            self.offset = mg.load_float(offset + (layer << 2).wide())
            self.row0, self.block0 = mg.load_word(origin), mg.load_word(origin + 4)

    @property
    def registers(self) -> int:
        """Raw registers of one scale."""
        return 2 if self.problem.double else 1

    def fetch(self, row: mg.Int, block: mg.Int) -> list[ir.Value]:
        """Start the loads of the scale of a row and block within bounds."""
        index = row.wide() * self.problem.blocks + block.wide()
        if not self.problem.double:
            return [mg.load_float(self.scales + (index << 2))]
        code = mg.load_byte(self.scales + index)
        place = (row + self.row0) * self.problem.pitch + self.block0 + block
        absmax = mg.load_float(self.absmax + (place // SECOND_LEVEL_BLOCK << 2).wide())
        return [code.value, absmax]

    def decode(self, raw: list[ir.Value]) -> ir.Value:
        """The float32 scale, bit for bit as `decode_scales` gives it."""
        if not self.problem.double:
            return raw[0]
        code, absmax = raw
        table = mg.load_float(self.table + (mg.Int(code) << 2).wide())
        return mg.mul_then_add(table, absmax, self.offset)
