"""The `qjax` command."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from qjax import tune
from qjax.demo.run import DemoError, run

app = typer.Typer(no_args_is_help=True, add_completion=False, help="4-bit models in JAX and Flax.")


app.command("tune")(tune.command)


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


if __name__ == "__main__":
    app()
