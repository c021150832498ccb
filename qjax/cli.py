"""The `qjax` command."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from qjax import planning
from qjax.demo.run import DemoError, run

app = typer.Typer(no_args_is_help=True, add_completion=False, help="4-bit models in JAX and Flax.")


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for the adapters and the loss curve.")
    ] = Path("demo-output"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 40,
) -> None:
    """Quantize a real language model, ask it, fine-tune it, save, reload, and ask again."""
    console = Console()
    try:
        run(output, steps=steps, console=console)
    except (DemoError, ModuleNotFoundError) as error:
        console.print(Text(str(error), style="bold red"))  # as it is: brackets are no markup
        raise typer.Exit(1) from None


@app.command()
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


if __name__ == "__main__":
    app()
