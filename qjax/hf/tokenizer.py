"""Tokenizers: from tokenizer.json, or rebuilt from the metadata of a GGUF file."""

from pathlib import Path

from qjax.hf.extras import require
from qjax.hf.gguf import Metadata
from qjax.hf.hub import locate

# `tokenizer.ggml.pre`, the name of how text is cut up before byte-pair merging -> digits apart?
_DIGITS_APART = {"smollm": True, "gpt-2": False, "default": False}
_CONTROL = 3  # gguf token type: special tokens, matched before anything else


def load_tokenizer(path):
    """Return the `tokenizers.Tokenizer` of a model.

    Args:
        path: a model folder, a tokenizer.json, a .gguf file or the name of a model on the hub.

    Raises:
        ValueError: no tokenizer there.
        ModuleNotFoundError: `tokenizers` (extra `hf`) or `gguf` (extra `gguf`) is not installed.

    Example:
        >>> tokenizer = qjax.load_tokenizer("model.gguf")  # doctest: +SKIP
        >>> ids = tokenizer.encode("Hello").ids  # doctest: +SKIP
    """
    tokenizers = require("tokenizers", "hf")
    file = Path(path).expanduser()
    path = file if file.is_file() else locate(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path} is not a file: no tokenizer to load")
    if path.suffix == ".gguf":
        return _from_gguf(path)
    return tokenizers.Tokenizer.from_file(str(path))


def _from_gguf(path: Path):
    tokenizers = require("tokenizers", "hf")
    metadata = Metadata(path)
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if model != "gpt2" or pre not in _DIGITS_APART:
        raise NotImplementedError(
            f"{path}: tokenizer.ggml.model={model!r} with pre={pre!r}; "
            f"known: 'gpt2' with {sorted(_DIGITS_APART)}"
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges")]
    types = metadata.get("tokenizer.ggml.token_type")
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    steps = [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if _DIGITS_APART[pre]:
        steps.insert(0, tokenizers.pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    )
    return tokenizer
