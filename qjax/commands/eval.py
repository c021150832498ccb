"""`qjax eval`: how well a model predicts a text, and what quantization cost it."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from qjax.commands.errors import one_line
from qjax.quality.config import compute_dtype, quant_config
from qjax.quality.measure import Text, measure
from qjax.quality.models import Loaded, load_model
from qjax.quality.summary import as_table, check_outputs, write_outputs

PATH_HELP = (
    "A model folder, a folder that qjax.save wrote, a .gguf file, or the name of a model on the "
    "Hugging Face hub."
)
TextFile = Annotated[Path, typer.Option(help="The text, UTF-8. It is read piece by piece.")]
Window = Annotated[
    int | None,
    typer.Option(help="Tokens read at a time.", show_default="what the model takes, at most 1024"),
]
Stride = Annotated[
    int | None,
    typer.Option(
        help="Tokens that are scored of each window; the others are context.",
        show_default="half of it",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Windows at a time.")]
MaxTokens = Annotated[
    int | None, typer.Option(min=2, help="Tokens to stop after.", show_default="all")
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="To compute in.", show_default="float32 on a CPU, bfloat16 elsewhere"),
]
Out = Annotated[Path | None, typer.Option(help="A JSON file for the numbers.")]
Plot = Annotated[Path | None, typer.Option(help="A PNG file for the errors by layer.")]


def evaluate(
    path: Annotated[str, typer.Argument(metavar="PATH", help=f"The model. {PATH_HELP}")],
    text: TextFile,
    reference: Annotated[
        str | None,
        typer.Option(
            help="The model in floating point, to compare with. For a folder of qjax.save also "
            "what it was made of.",
            show_default="PATH itself with --format, --config or --kv-format",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="Quantize a float model as it is read, such as nf4, int4 or int8."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="The same, with the fields of QuantConfig in a JSON file."),
    ] = None,
    kv_format: Annotated[
        Literal["int8", "int4"] | None,
        typer.Option(
            help="Hold keys and values in 8 or 4 bits, as in generate.",
            show_default="as they are computed",
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
    """Measure a model on a text: perplexity, and what quantization changed.

    Beside a reference: the KL divergence of the predictions (mean of a token, in nats), how often
    both find the same token the most likely, and the error of each weight. Encoders are compared by
    the cosine of their embeddings.
    """
    with one_line():
        check_outputs(out, plot)
        computing = compute_dtype(dtype)
        quant = quant_config(format, config, computing)
        if quant is not None and reference is None:
            reference = path
        if plot is not None and reference is None:
            raise ValueError("--plot shows errors against a model in floating point: --reference")
        models = [load_model(path, config=quant, dtype=computing, base=reference)]
        if reference is not None:
            models.append(load_model(reference, dtype=computing))
        elif kv_format is not None:
            models *= 2  # the same model without
        reads = Text(text, window, stride, batch_size, max_tokens)
        report(models, reads, out, plot, ("model", "reference"), kv_format)


def report(
    models: list[Loaded],
    text: Text,
    out: Path | None,
    plot: Path | None,
    titles: tuple[str, str],
    kv_format: str | None = None,
) -> None:
    """Measure the first model, against the second if there is one, and show it."""
    found = measure(models, text, kv_format)
    Console(soft_wrap=True).print(as_table(models, found, titles), highlight=False)
    write_outputs(models, found, text, out, plot)
