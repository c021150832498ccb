"""The metadata of a GGUF file as a config.json of Hugging Face.

Keys are those of llama.cpp's gguf-py, constants.py. What its files do not say (biases, activations,
the pattern of windows) is as in llama.cpp's own code for the architecture.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.models.config import FULL, SLIDING

# general.architecture -> model_type. A "llama" with experts is a Mixtral.
_MODEL_TYPES = {
    "bert": "bert",
    "bloom": "bloom",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt-oss": "gpt_oss",
    "gpt2": "gpt2",
    "gptneox": "gpt_neox",
    "llama": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}


def model_type(metadata) -> str:
    """Return the `model_type` of a file; an unknown architecture names the known ones."""
    architecture = metadata.get("general.architecture")
    if architecture not in _MODEL_TYPES:
        raise ValueError(
            f"{metadata.path}: general.architecture={architecture!r} is not known; "
            f"known: {sorted(_MODEL_TYPES)}"
        )
    if architecture == "llama" and metadata.get("llama.expert_count", 0):
        return "mixtral"
    return _MODEL_TYPES[architecture]


def config_json(
    kind: str, metadata, shapes: Mapping[str, Sequence[int]], factors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Return the config.json.

    Args:
        kind: the `model_type`.
        metadata: of the file.
        shapes: of its tensors, [out, in] for a linear layer.
        factors: those of `gguf_tensors.FACTORS` that it has: divisors of RoPE's frequencies.
    """
    architecture = metadata.get("general.architecture")

    def get(key: str, *default: Any) -> Any:
        value = metadata.get(f"{architecture}.{key}", *default)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    heads, hidden = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", hidden // heads)
    data = {
        "model_type": kind,
        "dtype": "float32",
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length", 4 * hidden),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length", 2048),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", 1e-6),
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    data["rope_parameters"] = _rope(kind, get, data, factors)
    change = _CHANGES.get(kind)
    return data if change is None else change(data, get, shapes)


def _rope(kind: str, get, data: Mapping[str, Any], factors: Mapping[str, np.ndarray]):
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": get("rope.freq_base", 10000.0)}
    rope["partial_rotary_factor"] = get("rope.dimension_count", data["head_dim"]) / data["head_dim"]
    scaling = get("rope.scaling.type", "none")
    original = get("rope.scaling.original_context_length", data["max_position_embeddings"])
    listed = {name: [float(f) for f in value] for name, value in factors.items()}
    if plain := listed.get("rope_freqs.weight"):  # the llama3 ramp, the same for all lengths
        listed = {"rope_factors_short.weight": plain, "rope_factors_long.weight": plain}
        rope["attention_factor"] = 1.0
    elif listed and get("rope.scaling.attn_factor", None) is not None:
        rope["attention_factor"] = get("rope.scaling.attn_factor")
    if listed:
        return rope | {
            "rope_type": "longrope",
            "short_factor": listed["rope_factors_short.weight"],
            "long_factor": listed["rope_factors_long.weight"],
            "original_max_position_embeddings": original,
        }
    if scaling == "none":
        return rope
    if scaling not in ("linear", "yarn"):
        raise ValueError(f"rope.scaling.type={scaling!r} must be none, linear or yarn")
    rope |= {"rope_type": scaling, "factor": get("rope.scaling.factor")}
    if scaling == "yarn":
        rope |= {
            "original_max_position_embeddings": original,
            "beta_fast": get("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": get("rope.scaling.yarn_beta_slow", 1.0),
            "truncate": kind != "gpt_oss",  # its own config; llama.cpp rounds for all
        }
    return rope


def _windows(get, count: int, every: int) -> dict[str, Any]:
    """Return the window, in all layers but each `every`-th unless the file lists them."""
    pattern = get("attention.sliding_window_pattern", every)
    if isinstance(pattern, int):
        pattern = [(i + 1) % pattern != 0 for i in range(count)]
    kinds = [SLIDING if sliding else FULL for sliding in pattern]
    return {"sliding_window": get("attention.sliding_window"), "layer_types": kinds}


def _gemma(data, get, every: int, largest: int) -> dict[str, Any]:
    # The scale is that of a head, but in the largest model (of so many layers).
    layers, heads = data["num_hidden_layers"], data["num_attention_heads"]
    scalar = data["hidden_size"] / heads if layers == largest else data["head_dim"]
    scale = get("attention.scale", None)
    return data | {
        "query_pre_attn_scalar": scalar if scale is None else scale**-2,
        "attn_logit_softcapping": get("attn_logit_softcapping", None),
        "final_logit_softcapping": get("final_logit_softcapping", None),
        **_windows(get, layers, every),
    }


def _gemma3(data, get, shapes) -> dict[str, Any]:
    data = _gemma(data, get, 6, 62)
    local = {"rope_type": "default", "rope_theta": get("rope.freq_base_swa", 10000.0)}
    return data | {"rope_parameters": {FULL: data["rope_parameters"], SLIDING: local}}


def _experts(data, get) -> dict[str, Any]:
    count, used = get("expert_count"), get("expert_used_count")
    return data | {"num_local_experts": count, "num_experts_per_tok": used}


def _gpt_oss(data, get, shapes) -> dict[str, Any]:
    data = _experts(data, get) | _windows(get, data["num_hidden_layers"], 2)
    return data | {"intermediate_size": get("expert_feed_forward_length")}


def _phi3(data, get, shapes) -> dict[str, Any]:
    return data | {"sliding_window": get("attention.sliding_window", None) or None}


def _plain(data, get, **keys: Any) -> dict[str, Any]:
    """Return only what all families spell alike, and `keys`."""
    common = ("model_type", "dtype", "vocab_size", "hidden_size", "tie_word_embeddings")
    return {key: data[key] for key in common} | keys


def _gpt2(data, get, shapes) -> dict[str, Any]:
    return _plain(
        data,
        get,
        n_embd=data["hidden_size"],
        n_layer=data["num_hidden_layers"],
        n_head=data["num_attention_heads"],
        n_positions=data["max_position_embeddings"],
        n_inner=data["intermediate_size"],
        layer_norm_epsilon=get("attention.layer_norm_epsilon"),
    )


def _bloom(data, get, shapes) -> dict[str, Any]:
    return _plain(
        data,
        get,
        n_layer=data["num_hidden_layers"],
        n_head=data["num_attention_heads"],
        layer_norm_epsilon=get("attention.layer_norm_epsilon"),
    )


def _gpt_neox(data, get, shapes) -> dict[str, Any]:
    parallel = get("use_parallel_residual", True)
    eps = get("attention.layer_norm_epsilon")
    return data | {"layer_norm_eps": eps, "use_parallel_residual": parallel}


def _bert(data, get, shapes) -> dict[str, Any]:
    types = shapes["token_types.weight"][0] if "token_types.weight" in shapes else 2
    eps = get("attention.layer_norm_epsilon")
    return data | {"layer_norm_eps": eps, "type_vocab_size": types, "tie_word_embeddings": True}


_CHANGES = {
    "bert": _bert,
    "bloom": _bloom,
    "gemma2": lambda data, get, shapes: _gemma(data, get, 2, 46),
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "gpt_oss": _gpt_oss,
    "mixtral": lambda data, get, shapes: _experts(data, get),
    "phi3": _phi3,
}
