"""`qjax quantize`: a float checkpoint to a 4-bit one, which transformers loads too."""

import shutil
import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

import qjax
from qjax.commands.errors import one_line
from qjax.hf.hub import COMPANIONS, locate


def quantize(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="The model: a folder with config.json and safetensors, a .gguf file, or the name "
            "of a model on the Hugging Face hub.",
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
    format: Annotated[
        Literal["nf4", "fp4"], typer.Option(help="The table of 16 values. nf4 is more exact.")
    ] = "nf4",
    block_size: Annotated[
        int, typer.Option(help="Weights that share a scale; 32 is more exact, 64 is usual.")
    ] = 64,
    double_quant: Annotated[
        bool, typer.Option(help="Store the scales in 8 bits: 4.13 bits a weight in place of 4.5.")
    ] = True,
    compute_dtype: Annotated[
        Literal["bfloat16", "float16", "float32"],
        typer.Option(help="What transformers is told to compute in."),
    ] = "bfloat16",
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(
            help="Of the weights that stay in floating point.", show_default="as they are"
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Quantize only what this pattern finds, such as mlp. May be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Leave alone what this pattern finds. May be repeated."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that is in DST.")] = False,
) -> None:
    """Quantize a model to 4 bits and save it.

    Reads one tensor at a time, so that it needs little more memory than the result. DST gets the
    layout of bitsandbytes, which qjax and transformers both load, and SRC's tokenizer. See what is
    in it with `qjax inspect DST`.
    """
    with one_line():
        started = time.perf_counter()
        config = qjax.QuantConfig(
            format=format,
            block_size=block_size,
            double_quant=double_quant,
            compute_dtype=compute_dtype,
            include=tuple(include) if include else None,
            exclude=tuple(exclude) if exclude else None,
        )
        path = locate(source)
        if (target / "config.json").exists() and (not overwrite or target.samefile(path)):
            raise ValueError(f"DST={str(target)!r} holds a model; choose another, or --overwrite")
        model = qjax.from_pretrained(path, config=config, dtype=dtype)
        model.save_pretrained(target)
        copied = copy_companions(path, target)
        totals = qjax.report(model).totals
        Console(soft_wrap=True).print(
            f"Wrote {target}: {totals.params:,} parameters in {totals.nbytes / 1e6:,.1f} MB, "
            f"{totals.nbytes / totals.float_nbytes:.0%} of the original, in "
            f"{time.perf_counter() - started:.1f} s"
            + (f", with {', '.join(copied)}" if copied else ""),
            highlight=False,
            markup=False,
        )


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer and the like from one model folder to another; return their names."""
    if not source.is_dir():
        return []
    files = sorted({file for pattern in COMPANIONS for file in source.glob(pattern)})
    for file in files:
        shutil.copyfile(file, target / file.name)
    return [file.name for file in files]
