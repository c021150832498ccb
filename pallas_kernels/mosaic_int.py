"""Integer registers of a thread, in the bodies of the Mosaic GPU kernels."""

from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith


def i32() -> ir.Type:
    """The type of a word."""
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    """The type of a global address."""
    return ir.IntegerType.get_signless(64)


def f32() -> ir.Type:
    """The type of a float."""
    return ir.F32Type.get()


class Int:
    """An unsigned 32- or 64-bit register. Comparisons give an i1 value for `when` and `select`."""

    def __init__(self, value: int | ir.Value):
        self.value = arith.constant(i32(), value) if isinstance(value, int) else value

    def _operands(self, other: "int | Int") -> tuple[ir.Value, ir.Value]:
        if isinstance(other, int):
            return self.value, arith.constant(self.value.type, other)
        return self.value, other.value

    def __add__(self, other):
        return Int(arith.addi(*self._operands(other)))

    def __sub__(self, other):
        return Int(arith.subi(*self._operands(other)))

    def __mul__(self, other):
        return Int(arith.muli(*self._operands(other)))

    def __floordiv__(self, other):
        return Int(arith.divui(*self._operands(other)))

    def __mod__(self, other):
        return Int(arith.remui(*self._operands(other)))

    def __and__(self, other):
        return Int(arith.andi(*self._operands(other)))

    def __or__(self, other):
        return Int(arith.ori(*self._operands(other)))

    def __xor__(self, other):
        return Int(arith.xori(*self._operands(other)))

    def __lshift__(self, other):
        return Int(arith.shli(*self._operands(other)))

    def __rshift__(self, other):
        return Int(arith.shrui(*self._operands(other)))

    def __lt__(self, other) -> ir.Value:
        return arith.cmpi(arith.CmpIPredicate.ult, *self._operands(other))

    def equals(self, other) -> ir.Value:
        """Whether they are equal, as an i1 value."""
        return arith.cmpi(arith.CmpIPredicate.eq, *self._operands(other))

    def at_most(self, other) -> "Int":
        """The lesser."""
        return Int(arith.minui(*self._operands(other)))

    def wide(self) -> "Int":
        """Zero-extend to 64 bits."""
        return Int(arith.extui(i64(), self.value))
