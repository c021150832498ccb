"""`qjax plan`."""

from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from qjax import planning


def plan(
    params: Annotated[float, typer.Option(help="Parameters of the model, such as 70e9.")],
    seq: Annotated[int, typer.Option(help="Tokens of a row.")] = 2048,
    batch: Annotated[int, typer.Option(help="Rows of a batch.")] = 1,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    optimizer: Annotated[str, typer.Option(help="adamw or adamw8bit.")] = "adamw",
) -> None:
    """Estimate the GPU memory of QLoRA training of a Llama of this size."""
    console = Console()
    try:
        found = planning.plan(params, seq=seq, batch=batch, rank=rank, optimizer=optimizer)
    except ValueError as error:
        console.print(Text(str(error), style="bold red"))
        raise typer.Exit(1) from None
    console.print(Text(str(found)))
