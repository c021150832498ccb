"""Where a model is: a folder or file as named, or a model of the hub, fetched to its cache."""

from pathlib import Path

from qjax.hf.extras import require

# What belongs to a model beside its weights: the tokenizer, and how to generate.
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("spiece.model", "chat_template*", "generation_config.json"),
)
_WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json")


def locate(path_or_id) -> Path:
    """Return the folder or .gguf file of a model.

    A name such as "HuggingFaceTB/SmolLM2-135M" that is no path is one of the hub: it is fetched by
    `huggingface_hub`, whose cache and settings (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN ...) count.

    Raises:
        ValueError: nothing is there.
        ModuleNotFoundError: a name of the hub without `huggingface_hub` (extra `hf`).
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    name = str(path_or_id)
    if path.exists() or path.is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise ValueError(f"path_or_id={name!r} is no model folder, .gguf file or hub id")
    hub = require("huggingface_hub", "hf")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=[*_WEIGHTS, *COMPANIONS]))
    except (OSError, ValueError) as error:  # its own errors are both, or one of them
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"path_or_id={name!r} is no folder here, and the hub did not give it: {reason}"
        ) from None
