"""Two checkpoints on a text: what they predict, and how far their weights are apart."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from qjax.evaluation import Quality, Similarity, compare_embeddings, evaluate, layer_errors
from qjax.models import MaskedLM
from qjax.quality.models import Loaded
from qjax.quality.text import frame_of, text_batches

_WINDOW = 1024  # at most, unless it is asked for: the logits of a window are held
_TEXT = 128  # tokens of what an encoder makes one embedding of


@dataclasses.dataclass(frozen=True)
class Text:
    """What is read, and how.

    Attributes:
        file: UTF-8.
        window: tokens of a window; None is what the models take, 1024 at most (encoders: 128).
        stride: tokens of it that are scored; None is half of it (encoders: all).
        batch_size: windows at a time.
        max_tokens: where to stop.
    """

    file: Path
    window: int | None = None
    stride: int | None = None
    batch_size: int = 1
    max_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        quality: of a language model; None for an encoder.
        similarity: of an encoder and its reference.
        layers: relative error of each matrix, by path; None without a reference.
        unlike: why the layers cannot be compared, where they cannot.
        window, stride: as they were used.
    """

    quality: Quality | None
    similarity: Similarity | None
    layers: dict[str, float] | None
    window: int
    stride: int
    unlike: str = ""


def measure(models: list[Loaded], text: Text, kv_format: str | None = None) -> Measured:
    """Measure a model on a text, against the second of the models if there is one.

    Args:
        kv_format: has the first model read keys and values in this format, as in `evaluate`.

    Raises:
        ValueError: no tokenizer, or two that differ; models of different kinds or vocabularies; a
            text that is empty or too short; an encoder without a second, or with a kv_format.
    """
    tokenizer = _tokenizer(models)
    _check_alike(models)
    encodes = isinstance(models[0].model, MaskedLM)
    if encodes and len(models) == 1:
        raise ValueError(
            f"{models[0].name} is an encoder, which has no perplexity: name a reference, to "
            "compare the embeddings of both"
        )
    if encodes and kv_format is not None:
        raise ValueError(
            f"kv_format={kv_format!r}: {models[0].name} is an encoder, without a cache"
        )
    window, stride = _windows(models, tokenizer, text, encodes)
    sizes = {"window": window, "stride": stride, "batch_size": text.batch_size}
    batches = text_batches(text.file, tokenizer, **sizes, max_tokens=text.max_tokens, ends=encodes)
    quality = similarity = layers = None
    if encodes:
        runs = [_encoder(each.model) for each in models]
        similarity = compare_embeddings(runs[0], ((b.ids, b.real) for b in batches), runs[1])
    else:
        quality = evaluate(
            models[0].model,
            ((b.ids, b.scored) for b in batches),
            *[each.model for each in models[1:]],
            kv_format=kv_format,
        )
    unlike = ""
    if len(models) == 2:
        try:
            layers = layer_errors(*[each.model for each in models])
        except ValueError as error:  # models of other sizes may have one vocabulary
            unlike = str(error)
    return Measured(quality, similarity, layers, window, stride, unlike)


def _tokenizer(models: list[Loaded]) -> Any:
    """Return the tokenizer that the models have, or the one of them that has one."""
    held = [each for each in models if each.tokenizer is not None]
    if not held:
        raise ValueError(f"{models[0].name} has no tokenizer.json: a text cannot be read without")
    if len(held) == 2 and held[0].tokenizer.get_vocab() != held[1].tokenizer.get_vocab():
        raise ValueError(
            f"{held[0].name} and {held[1].name} have different tokenizers: their predictions of a "
            "token cannot be compared"
        )
    return held[0].tokenizer


def _check_alike(models: list[Loaded]) -> None:
    first = models[0]
    for other in models[1:]:
        if type(first.model) is not type(other.model):
            kinds = f"{type(first.model).__name__} and {type(other.model).__name__}"
            raise ValueError(f"{first.name} and {other.name} are models of two kinds: {kinds}")
        sizes = [each.model.config.vocab_size for each in (first, other)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{first.name} has a vocabulary of {sizes[0]} tokens, {other.name} one of "
                f"{sizes[1]}: they cannot be compared"
            )


def _windows(models: list[Loaded], tokenizer: Any, text: Text, encodes: bool) -> tuple[int, int]:
    """Return the window and the stride to use, checked against what the models take."""
    limits = [each.model.config.max_position_embeddings for each in models]
    longest = min((limit for limit in limits if limit is not None), default=None)
    window = text.window
    if window is None:
        window = min(_TEXT if encodes else _WINDOW, longest or _WINDOW)
    if longest is not None and window > longest:
        raise ValueError(f"window={window} is more than the {longest} tokens that the model takes")
    frame = frame_of(tokenizer)
    room = window - len(frame.before) - (len(frame.after) if encodes else 0)
    if text.stride is not None:
        return window, text.stride
    return window, max(1, room if encodes else room // 2)


def _encoder(model: MaskedLM):
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, ids, mask: nnx.merge(graphdef, state).encode(ids, mask))
    return functools.partial(run, state)
