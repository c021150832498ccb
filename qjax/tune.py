"""`qjax tune`: measure the matmul kernels on this GPU, for dispatch to take the fastest."""

import re
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pallas_kernels import dispatch, tune, user_tiles
from pallas_kernels.user_tiles import Key

_SHAPE = re.compile(r"(\d+)x(\d+)")


def command(
    shapes: Annotated[list[str], typer.Argument(help="Weights as INxOUT, such as 4096x14336.")],
    rows: Annotated[str, typer.Option(help="Rows of x, by commas.")] = "1,8,16,32,64,128,256,512",
    block_size: Annotated[int, typer.Option(min=2, help="Weights that share a scale.")] = 64,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    double_quant: Annotated[bool, typer.Option(help="Double-quantized scales.")] = False,
    backward: Annotated[bool, typer.Option(help="The gradient's product, dX = dY @ W.")] = False,
    tiles: Annotated[int, typer.Option(min=1, help="Tile choices to try, of each kernel.")] = 6,
) -> None:
    """Measure the kernels for these shapes on this GPU and keep the fastest for later runs."""
    console = Console()
    keys = make_keys(shapes, rows, block_size, dtype, double_quant, backward)
    where = dispatch.target()
    if not where.is_cuda:
        console.print(f"qjax tune needs an NVIDIA GPU, and this is {where.kind}.", style="bold red")
        raise typer.Exit(1)
    choices = {}
    table = Table("in x out", "rows", "fastest", "us", "next best, us", box=None)
    for key, found in tune.measure(keys, limit=tiles):
        best, *others = found
        choices[key] = best
        name = f"{best.backend} {best.tiles or ''}"
        others = [f"{choice.us}" for choice in others[:1]]
        table.add_row(f"{key.k}x{key.n}", str(key.m), name, str(best.us), *others)
    console.print(table)
    console.print(f"Written to {user_tiles.add(where.kind, choices)}", soft_wrap=True)


def make_keys(
    shapes: list[str], rows: str, block_size: int, dtype: str, double: bool, transpose: bool
) -> list[Key]:
    """The matmuls to measure.

    Raises:
        typer.BadParameter: an argument that names none.
    """
    if dtype not in ("bfloat16", "float16", "float32"):
        raise typer.BadParameter(f"--dtype is {dtype!r}; use bfloat16, float16 or float32")
    keys = []
    for shape in shapes:
        match = _SHAPE.fullmatch(shape)
        if match is None:
            raise typer.BadParameter(f"{shape!r} is not INxOUT, such as 4096x14336")
        k, n = map(int, match.groups())
        if not n or not k or k % block_size:
            raise typer.BadParameter(f"{shape}: blocks of {block_size} do not divide {k} inputs")
        for m in rows.split(","):
            if not m.strip().isdigit() or not int(m):
                raise typer.BadParameter(f"--rows is {rows!r}; use positive numbers, by commas")
            keys.append(Key(int(m), n, k, block_size, dtype, double, transpose))
    return keys
