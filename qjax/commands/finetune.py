"""`qjax finetune`: LoRA on a 4-bit model, from a file of chats or texts."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

import qjax
from qjax.commands.errors import one_line
from qjax.finetune.run import Settings
from qjax.finetune.run import finetune as run


def finetune(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="The model: a folder with config.json, safetensors and tokenizer.json, a .gguf "
            "file, or the name of a model on the Hugging Face hub.",
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            help='A file with one JSON object a line: {"messages": [...]} with roles and contents, '
            '{"prompt": ..., "completion": ...} or {"text": ...}.'
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for the adapter, the loss curve and the checkpoints.")
    ] = Path("finetune-output"),
    epochs: Annotated[float, typer.Option(min=0.01, help="Times over the data.")] = 1.0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps, in place of --epochs.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a step.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a row.")] = 512,
    packing: Annotated[
        bool, typer.Option(help="Put several short examples in a row; none sees another.")
    ] = True,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of AdamW, at its peak.")] = 2e-4,
    rank: Annotated[int, typer.Option(min=1, help="Size of the adapter.")] = 16,
    alpha: Annotated[
        float, typer.Option(min=0, help="Weight of the adapter, relative to its size.")
    ] = 32,
    dropout: Annotated[float, typer.Option(min=0, max=0.99, help="Of the adapter's input.")] = 0.0,
    dora: Annotated[
        bool, typer.Option("--dora", help="Learn the weights' lengths too: better, and slower.")
    ] = False,
    init: Annotated[
        Literal["kaiming", "loftq"],
        typer.Option(help="loftq begins by making up for what quantization lost."),
    ] = "kaiming",
    include: Annotated[
        list[str] | None,
        typer.Option(
            help="Adapt only layers whose path this pattern finds, such as self_attn. May be "
            "repeated."
        ),
    ] = None,
    quantize: Annotated[
        bool, typer.Option(help="Hold the model in 4 bits; --no-quantize for its own dtype.")
    ] = True,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the adapter and the order of the data.")] = 0,
) -> None:
    """Teach a model from examples: a small adapter beside its 4-bit weights.

    In chats and completions only the answers are trained, in texts everything. OUTPUT gets
    adapter/, which qjax.load_adapter and PEFT load, and loss.png. A run that was interrupted goes
    on when the same command is given again.
    """
    with one_line():
        settings = Settings(
            model=path,
            data=str(data),
            steps=steps,
            epochs=epochs,
            batch_size=batch_size,
            length=length,
            packing=packing,
            learning_rate=learning_rate,
            lora=qjax.LoraConfig(
                rank=rank,
                alpha=alpha,
                dropout=dropout,
                dora=dora,
                init=init,
                loftq_iterations=1,
                include=tuple(include) if include else None,
            ),
            quantize=quantize,
            seed=seed,
        )
        console = Console(soft_wrap=True)
        losses = run(settings, output, save_every=save_every, console=console)
        console.print(
            f"{len(losses)} steps, last loss {losses[-1]:.3f}. Adapter: {output / 'adapter'}",
            highlight=False,
            markup=False,
        )
