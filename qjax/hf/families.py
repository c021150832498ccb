"""How Hugging Face's model families map to `qjax.models`: config.json and the names of tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qjax.models import ModelConfig, RopeConfig

# Module path in the model -> prefix of its tensors' names; "{}" stands for the layer's index.
Names = Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """One `model_type`: how its config.json reads and what its tensors are called."""

    config: Callable[[Mapping[str, Any]], ModelConfig]
    names: Names


_BLOCK = (
    "input_layernorm",
    "self_attn/q_proj",
    "self_attn/k_proj",
    "self_attn/v_proj",
    "self_attn/o_proj",
    "post_attention_layernorm",
    "mlp/gate_proj",
    "mlp/up_proj",
    "mlp/down_proj",
)

_LLAMA_NAMES = {
    "embed_tokens": "model.embed_tokens",
    **{f"layers/{{}}/{name}": f"model.layers.{{}}.{name.replace('/', '.')}" for name in _BLOCK},
    "norm": "model.norm",
    "lm_head": "lm_head",
}


def _llama_config(data: Mapping[str, Any]) -> ModelConfig:
    heads = data["num_attention_heads"]
    return ModelConfig(
        vocab_size=data["vocab_size"],
        hidden_size=data["hidden_size"],
        intermediate_size=data["intermediate_size"],
        num_hidden_layers=data["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=data.get("num_key_value_heads") or heads,
        head_dim=data.get("head_dim") or data["hidden_size"] // heads,
        max_position_embeddings=data.get("max_position_embeddings", 2048),
        rms_norm_eps=data.get("rms_norm_eps", 1e-6),
        rope=rope_config(data),
        hidden_act=data.get("hidden_act", "silu"),
        attention_bias=data.get("attention_bias", False),
        mlp_bias=data.get("mlp_bias", False),
        tie_word_embeddings=data.get("tie_word_embeddings", False),
    )


def rope_config(data: Mapping[str, Any]) -> RopeConfig:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    theta = rope.get("rope_theta", data.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=rope["factor"])
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            kind="llama3",
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_length=rope["original_max_position_embeddings"],
        )
    raise NotImplementedError(f"rope_type={kind!r} in config.json: only default, linear and llama3")


FAMILIES: Mapping[str, Family] = {"llama": Family(_llama_config, _LLAMA_NAMES)}


def family(model_type: Any) -> Family:
    """Look up a family; an unknown `model_type` is an error that names the known ones."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type={model_type!r} in config.json is not known; known: {sorted(FAMILIES)}"
        )
    return FAMILIES[model_type]
