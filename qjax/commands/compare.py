"""`qjax compare`: two models side by side."""

from typing import Annotated

import typer

from qjax.commands.errors import one_line
from qjax.commands.eval import (
    PATH_HELP,
    BatchSize,
    Dtype,
    MaxTokens,
    Out,
    Plot,
    Stride,
    TextFile,
    Window,
    report,
)
from qjax.quality.config import compute_dtype
from qjax.quality.measure import Text
from qjax.quality.models import is_saved, load_model
from qjax.quality.summary import check_outputs


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help=f"A model. {PATH_HELP}")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another, with the same tokenizer.")],
    text: TextFile,
    base: Annotated[
        str | None,
        typer.Option(
            help="The model that folders of qjax.save were made of.", show_default="the other one"
        ),
    ] = None,
    window: Window = None,
    stride: Stride = None,
    batch_size: BatchSize = 1,
    max_tokens: MaxTokens = None,
    dtype: Dtype = None,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Show two models side by side: bytes, bits, perplexity, and how they differ.

    The KL divergence is that of A's predictions from B's, and differences of weights are relative
    to B's.
    """
    with one_line():
        check_outputs(out, plot)
        others = {first: second, second: first}
        models = []
        for path in (first, second):
            found = base or (None if is_saved(others[path]) else others[path])
            models.append(load_model(path, dtype=compute_dtype(dtype), base=found))
        reads = Text(text, window, stride, batch_size, max_tokens)
        report(models, reads, out, plot, ("A", "B"))
