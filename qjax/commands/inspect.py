"""`qjax inspect`: what a checkpoint holds, read from its head alone."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import qjax
from qjax.checkpoint.loading import describe
from qjax.commands.errors import one_line
from qjax.hf.gguf import Metadata
from qjax.hf.hub import locate
from qjax.hf.safetensors import SafetensorsFolder
from qjax.hf.skeleton import skeleton


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            help="A model folder, a folder that qjax.save wrote, a .gguf file, or the name of a "
            "model on the Hugging Face hub."
        ),
    ],
) -> None:
    """Show what a checkpoint holds: every weight, its format, its bits and bytes, and the totals.

    Of large models one line stands for all layers that are alike. No weight is loaded.
    """
    console = Console(soft_wrap=True)
    with one_line():
        if Path(path, "_CHECKPOINT_METADATA").exists():
            report = str(qjax.report(describe(path)))
            title = f"{path}: a checkpoint of qjax.save"
        elif path.endswith(".gguf"):
            title, report = f"{path}: GGUF", None
            table, total = gguf_table(Metadata(Path(path)))
        else:
            source = SafetensorsFolder(locate(path))
            report = str(qjax.report(skeleton(source)[0]))
            maker = source.groups.method.upper() if source.groups else "bitsandbytes"
            stored = f"4-bit ({maker})" if source.packed else source.dtype
            title = f"{path}: {source.data['model_type']}, {stored}"
        console.print(title, style="bold", markup=False, highlight=False)
        if report is None:
            console.print(table)
            console.print(total, highlight=False)
        else:
            console.print(report, markup=False, highlight=False)


def gguf_table(metadata: Metadata) -> tuple[Table, str]:
    """Return the tensors of a GGUF file as they are stored, and the totals as a line."""
    table = Table(box=None, pad_edge=False, header_style="")
    for name in ("tensor", "shape", "format"):
        table.add_column(name, no_wrap=True)
    for name in ("bits/param", "bytes"):
        table.add_column(name, no_wrap=True, justify="right")
    count = size = 0
    for tensor in metadata.reader.tensors:
        count, size = count + int(tensor.n_elements), size + int(tensor.n_bytes)
        bits = 8 * tensor.n_bytes / tensor.n_elements
        shape = str([int(n) for n in reversed(tensor.shape)])
        kind = tensor.tensor_type.name
        table.add_row(tensor.name, shape, kind, f"{bits:.3f}", f"{int(tensor.n_bytes):,}")
    return table, f"{count:,} parameters in {size / 1e6:,.1f} MB, {8 * size / count:.3f} bits each"
