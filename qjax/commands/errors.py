"""What a user did wrong, as one line on the terminal and exit code 1; a fault of ours as it is."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text


@contextmanager
def one_line(*also: type[Exception]) -> Iterator[None]:
    """Print the errors that qjax raises on purpose, and those of `also`, and leave with 1."""
    kinds = (ValueError, TypeError, NotImplementedError, ModuleNotFoundError, OSError, *also)
    try:
        yield
    except kinds as error:
        # As it is: brackets are no markup.
        Console(stderr=True, soft_wrap=True).print(Text(f"Error: {error}", style="bold red"))
        raise typer.Exit(1) from None
