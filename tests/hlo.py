"""What a compiled program sends between devices."""

import re

import numpy as np

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_OP = re.compile(rf"= (\(?[^=]*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def collectives(compiled) -> dict[str, int]:
    """Bytes of the results of each kind of collective."""
    totals: dict[str, int] = {}
    for result, kind, _ in _OP.findall(compiled.as_text()):
        for dtype, shape in _ARRAY.findall(result):
            size = np.prod([int(n) for n in shape.split(",") if n], dtype=int)
            totals[kind] = totals.get(kind, 0) + _BYTES[dtype] * int(size)
    return totals
