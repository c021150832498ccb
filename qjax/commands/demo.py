"""`qjax demo`: the whole library on a real language model."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qjax.commands.errors import one_line
from qjax.demo.run import DemoError, run


def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for the adapters and the loss curve.")
    ] = Path("demo-output"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 40,
) -> None:
    """Quantize a real language model, ask it, fine-tune it, save, reload, and ask again."""
    with one_line(DemoError):
        run(output, steps=steps, console=Console())
