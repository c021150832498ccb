"""What a model or a parameter tree holds: every leaf, its format, its bytes, and why it is so."""

import dataclasses
import io
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

from qjax.core.config import QuantConfig
from qjax.core.qtensor import QTensor
from qjax.nn.lora import ADAPTER_LEAVES
from qjax.swap.guess import role_of
from qjax.swap.leaves import iter_leaves
from qjax.swap.policy import skip_reason
from qjax.swap.trace_call import trace_nnx, trace_tree

_GROUPED_ABOVE = 40  # rows; longer tables show one row for all "layers/*/..." that are alike
_VECTORS = ("bias", "scale")


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf.

    Attributes:
        path: "/"-joined.
        shape: logical shape.
        format: "nf4" or "fp4", else the dtype.
        block_size: weights that share a scale; None for floats.
        double_quant: whether the scales are in 8 bits.
        layout: "rows" or "flat"; None for floats.
        bits_per_param: stored bits for each value, scales and tables included.
        nbytes: stored bytes.
        float_nbytes: bytes in the logical dtype.
        note: why a weight stays in floating point, or what is worth knowing of a 4-bit one.
        uses: with example arguments, what ran: "matmul: xla", "decode: ..."; () if nothing did.
    """

    path: str
    shape: tuple[int, ...]
    format: str
    block_size: int | None
    double_quant: bool
    layout: str | None
    bits_per_param: float
    nbytes: int
    float_nbytes: int
    note: str = ""
    uses: tuple[str, ...] | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether the leaf is a 4-bit weight."""
        return self.layout is not None


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over the rows of a report.

    Attributes:
        params: number of floating values, adapters included.
        nbytes: stored bytes.
        float_nbytes: bytes if every 4-bit weight had its logical dtype.
        quantized_params: number of values in 4-bit weights.
        quantized_nbytes: their bytes, scales and tables included.
        adapter_params: number of values in adapters.
    """

    params: int
    nbytes: int
    float_nbytes: int
    quantized_params: int
    quantized_nbytes: int
    adapter_params: int

    @property
    def quantized_bits_per_param(self) -> float:
        """Stored bits for each value of a 4-bit weight; 0 without any."""
        return 8 * self.quantized_nbytes / self.quantized_params if self.quantized_params else 0.0


@dataclasses.dataclass(frozen=True)
class Report:
    """What `report` returns; `str()` of it is a table.

    Attributes:
        rows: one for each leaf, in the order of the model.
    """

    rows: tuple[Row, ...]

    @property
    def totals(self) -> Totals:
        """Sums over the rows."""
        packed = [row for row in self.rows if row.is_quantized]
        adapters = [row for row in self.rows if _is_adapter(row.path)]
        return Totals(
            params=sum(math.prod(row.shape) for row in self.rows if _is_param(row)),
            nbytes=sum(row.nbytes for row in self.rows),
            float_nbytes=sum(row.float_nbytes for row in self.rows),
            quantized_params=sum(math.prod(row.shape) for row in packed),
            quantized_nbytes=sum(row.nbytes for row in packed),
            adapter_params=sum(math.prod(row.shape) for row in adapters),
        )

    def __getitem__(self, path: str) -> Row:
        """Return the row of a path.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if row.path == path:
                return row
        raise KeyError(path)

    def __str__(self) -> str:
        return _table(self)


def report(x: Any, *example_args: Any, **example_kwargs: Any) -> Report:
    """Say of each leaf what it is, what it takes, and why it was left in floating point.

    Args:
        x: an NNX model, its state, or any pytree with `QTensor`s (Linen parameters, say); arrays
            may be abstract.
        *example_args: of a call `x(*example_args, **example_kwargs)`, arrays or
            `jax.ShapeDtypeStruct`s, which is traced, not computed: each row then says which op and
            implementation ran for it, or that its weight was decoded whole. For a tree the first
            argument is what to call: a Linen module, or a function of the tree and the others.
        **example_kwargs: of the same call.

    Returns:
        A `Report`: `rows`, `totals`, `report[path]`, and a table as its `str()`.

    Raises:
        TypeError: x has no arrays, as a Linen module itself; or example arguments for a tree do
            not begin with something to call.

    Example:
        >>> model = qjax.quantize_model(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
        >>> r = report(model, jnp.ones((2, 64)))
        >>> r["kernel"].format, r["kernel"].uses
        ('nf4', ('matmul: xla',))
    """
    leaves = list(iter_leaves(x))
    if not isinstance(x, nnx.Module) and not any(hasattr(leaf, "shape") for _, leaf, _ in leaves):
        raise TypeError(f"x must be an NNX model, a state or a tree of arrays, got {x!r:.100}")
    uses = None
    if example_args or example_kwargs:
        trace = trace_nnx if isinstance(x, nnx.Module) else trace_tree
        uses = trace(x, *example_args, **example_kwargs)
    rows = []
    for path, leaf, why in leaves:
        row = _row(path, leaf, why)
        if uses is not None and row.is_quantized:
            row = dataclasses.replace(row, uses=uses.get(path, ()))
        rows.append(row)
    return Report(tuple(rows))


def memory_footprint(x: Any) -> int:
    """Return the bytes of all arrays of a model, state, pytree or `QTensor`.

    Scales, tables, adapters and random keys count; an array that several layers share counts once.
    Arrays may be abstract; of sharded ones all shards count.

    Example:
        >>> memory_footprint(qjax.quantize(jnp.ones((64, 64))))
        2120
    """
    leaves = jax.tree.leaves([leaf for _, leaf, _ in iter_leaves(x)])
    unique = {id(x) if isinstance(x, jax.Array) else i: x for i, x in enumerate(leaves)}
    return sum(_nbytes(leaf) for leaf in unique.values())


def _nbytes(leaf: Any) -> int:
    if isinstance(leaf, QTensor):
        return leaf.nbytes
    return leaf.size * leaf.dtype.itemsize if hasattr(leaf, "dtype") else 0


def _row(path: str, leaf: Any, reason: str | None) -> Row:
    nbytes = _nbytes(leaf)
    if not isinstance(leaf, QTensor):
        shape, dtype = tuple(leaf.shape), str(leaf.dtype)
        bits = 8 * nbytes / max(math.prod(shape), 1)
        note = reason if reason is not None else _why_float(path, leaf)
        return Row(path, shape, dtype, None, False, None, bits, nbytes, nbytes, note)
    note = reason or ""
    if leaf.layout == "flat":
        k = math.prod(leaf.contract_shape)
        note = f"decoded at each use: block_size={leaf.block_size} does not divide K={k}"
    return Row(
        path=path,
        shape=leaf.shape,
        format=leaf.format,
        block_size=leaf.block_size,
        double_quant=leaf.double_quant,
        layout=leaf.layout,
        bits_per_param=leaf.bits_per_param,
        nbytes=nbytes,
        float_nbytes=leaf.size * jnp.dtype(leaf.dtype).itemsize,
        note=note,
    )


def _is_adapter(path: str) -> bool:
    return path.rpartition("/")[2].endswith(ADAPTER_LEAVES)


def _is_param(row: Row) -> bool:
    return row.is_quantized or "float" in row.format


def _why_float(path: str, leaf: Any) -> str:
    """Say why, where quantize_model has not: by the default policy."""
    name = path.rpartition("/")[2]
    if _is_adapter(path):
        return "adapter"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return "not floating"
    if name in _VECTORS or len(leaf.shape) < 2:
        return "vectors are kept"
    return skip_reason(path, QuantConfig(), role=role_of(name)) or "not quantized"


def _table(report: Report) -> str:
    traced = any(row.uses is not None for row in report.rows)
    table = Table(box=None, pad_edge=False, header_style="")
    for name in ("path", "shape", "format", "block", "layout"):
        table.add_column(name, no_wrap=True)
    for name in ("bits/param", "bytes"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("note", no_wrap=True)
    for path, count, row in _grouped(report.rows):
        block = f"{row.block_size}{' dq' if row.double_quant else ''}" if row.is_quantized else ""
        uses = "; ".join(row.uses or ("not used",)) if traced and row.is_quantized else ""
        table.add_row(
            path,
            f"{count} x {list(row.shape)}" if count > 1 else str(list(row.shape)),
            row.format,
            block,
            row.layout or "",
            f"{row.bits_per_param:.3f}",
            f"{row.nbytes * count:,}",
            "; ".join(filter(None, [uses, row.note])),
        )
    output = io.StringIO()
    console = Console(file=output, width=10_000, color_system=None, highlight=False, markup=False)
    console.print(table)
    lines = [line.rstrip() for line in output.getvalue().splitlines()]
    return "\n".join([*lines, "", _summary(report.totals)])


def _grouped(rows: tuple[Row, ...]) -> Iterator[tuple[str, int, Row]]:
    if len(rows) <= _GROUPED_ABOVE:
        yield from ((row.path, 1, row) for row in rows)
        return

    def alike(row: Row) -> Row:
        return dataclasses.replace(row, path=re.sub(r"(^|/)\d+(?=/|$)", r"\1*", row.path))

    groups: dict[Row, list[Row]] = {}
    for row in rows:
        groups.setdefault(alike(row), []).append(row)
    for pattern, group in groups.items():
        yield (pattern.path if len(group) > 1 else group[0].path), len(group), group[0]


def _summary(totals: Totals) -> str:
    lines = [
        f"{totals.params:,} parameters in {_size(totals.nbytes)}; "
        f"{_size(totals.float_nbytes)} with every weight in floating point"
    ]
    if totals.quantized_params:
        share = totals.quantized_params / totals.params
        lines.append(
            f"{totals.quantized_params:,} of them ({share:.1%}) in 4-bit weights of "
            f"{totals.quantized_bits_per_param:.3f} bits: {_size(totals.quantized_nbytes)}"
        )
    if totals.adapter_params:
        lines.append(f"{totals.adapter_params:,} in adapters")
    return "\n".join(lines)


def _size(nbytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.4g} {unit}"
    return f"{nbytes} B"
