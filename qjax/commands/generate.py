"""`qjax generate`: continue a text, or answer a message, token by token."""

import json
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import typer
from rich.console import Console

import qjax
from pallas_kernels.dispatch import target
from qjax.commands.errors import one_line
from qjax.hf.chat import load_chat_template
from qjax.hf.gguf import Metadata
from qjax.hf.hub import locate
from qjax.hf.pretrained import open_checkpoint
from qjax.models import CausalLM, MaskedLM, Seq2SeqLM


def generate(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="The model: a folder with config.json and safetensors, a .gguf file, or the name "
            "of a model on the Hugging Face hub. It needs a tokenizer.",
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="The text. Without it, standard input is read."),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            help="Take the text as a message to answer, in the model's chat template; else it is "
            "continued.",
            show_default="chat where the model has a template",
        ),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="A PEFT adapter to put on the model.")
    ] = None,
    quantize: Annotated[
        Literal["nf4", "fp4"] | None,
        typer.Option(help="Quantize a float model to 4 bits as it is read.", show_default="as is"),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(min=1, help="When to stop at the latest, if the model can go so far."),
    ] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; 1 samples as trained.")
    ] = 0.0,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the likeliest tokens of this probability.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among this many tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    fuse: Annotated[
        bool | None,
        typer.Option(
            help="Make one product of queries, keys and values, and one of gate and up: faster "
            "steps. Doubly quantized scales then take 4.5 bits a weight in all, not 4.13, and the "
            "largest layers are held twice for a moment.",
            show_default="on a GPU, where the model can be fused",
        ),
    ] = None,
    kv_format: Annotated[
        Literal["int8", "int4"] | None,
        typer.Option(
            help="Hold the keys and values of the text so far in 8 or 4 bits: longer texts fit.",
            show_default="as they are computed",
        ),
    ] = None,
) -> None:
    """Continue a text, or answer a message, and print it as it comes.

    For example `qjax generate HuggingFaceTB/SmolLM2-135M-Instruct -p "Why is the sky blue?"
    --quantize nf4`. The first words take a while: the program is compiled for the model.
    """
    with one_line():
        text = sys.stdin.read() if prompt is None else prompt
        folder = locate(path)
        tokenizer = qjax.load_tokenizer(folder)
        ids = encode(folder, tokenizer, text, chat)
        model = fused(load(folder, quantize, adapter), fuse)
        stop = stop_tokens(folder)
        sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        sampling["kv_format"] = kv_format
        sampling |= {"key": jax.random.key(seed), "stop_tokens": stop}
        tokens = stream(model, ids, min(max_new_tokens, room(model, ids)), **sampling)
        console = Console(soft_wrap=True)
        for piece in decode(tokenizer, tokens, stop):
            console.out(piece, end="", highlight=False)
        console.out()


def encode(folder: Path, tokenizer: Any, text: str, chat: bool | None) -> list[int]:
    """Return the tokens of the text, in the model's chat template if it is to be used."""
    template = None if chat is False else load_chat_template(folder)
    if chat and template is None:
        raise ValueError(f"{folder} has no chat template: use --no-chat")
    if template is None:
        ids = tokenizer.encode(text).ids
    else:
        text = template.render([{"role": "user", "content": text}], add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not ids:
        raise ValueError("the prompt is empty")
    return ids


def load(folder: Path, format: str | None, adapter: Path | None) -> Any:
    """Load the model, its layers stacked where that can be, so that it compiles quickly."""
    kind = open_checkpoint(folder).family.model
    if kind is MaskedLM:
        raise ValueError(f"{folder} holds an encoder, which generates no text")
    dtype = jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    config = qjax.QuantConfig(format=format, compute_dtype=dtype) if format else None
    scan = kind is CausalLM and adapter is None  # an adapter may differ between layers
    model = qjax.from_pretrained(folder, config=config, dtype=dtype, scan_layers=scan)
    return model if adapter is None else qjax.load_adapter(model, adapter)


def fused(model: Any, wanted: bool | None) -> Any:
    """Fuse the model's projections; where nobody said so, on a GPU, if they can be fused."""
    if wanted or (wanted is None and target().is_cuda):
        try:
            qjax.fuse_projections(model)
        except (ValueError, NotImplementedError):  # the model is as it was
            if wanted:
                raise
    return model


def room(model: Any, ids: list[int]) -> int:
    """Return how many tokens the model can add."""
    longest = model.config.max_position_embeddings or sys.maxsize
    if len(ids) >= longest:
        raise ValueError(f"the prompt has {len(ids)} tokens, the model takes texts of {longest}")
    return longest - len(ids)


def stop_tokens(folder: Path) -> tuple[int, ...]:
    """Return the tokens that end a text, by the files beside the model."""
    if folder.is_file():
        found = Metadata(folder).get("tokenizer.ggml.eos_token_id", None)
    else:
        files = (folder / "generation_config.json", folder / "config.json")
        held = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
        found = next((d["eos_token_id"] for d in held if d.get("eos_token_id") is not None), None)
    listed = found if isinstance(found, list) else [found]
    return tuple(int(token) for token in listed if token is not None)


def stream(model: Any, ids: list[int], count: int, **sampling: Any) -> Iterator[int]:
    """Yield up to `count` tokens that continue `ids`, each as soon as it is chosen."""
    reads = jnp.asarray([ids], jnp.int32)
    if isinstance(model, Seq2SeqLM):
        yield from model.generate(reads, max_new_tokens=count, **sampling)[0, 1:].tolist()
        return
    for tokens in model.stream(reads, max_new_tokens=count, every=1, **sampling):
        yield int(tokens[0, 0])


def decode(tokenizer: Any, tokens: Iterable[int], stop: Collection[int]) -> Iterator[str]:
    """Yield the text of the tokens as far as it is whole: a character may take several tokens."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        if token in stop:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(ids)[len(shown) :]
