"""Llama and its near kin: Mistral, Qwen 2 and 3, Phi 3."""

from qjax.hf.families.base import (
    LLAMA_NAMES,
    QK_NORM_NAMES,
    Data,
    Family,
    layer_types,
    llama_fields,
    same_names,
)
from qjax.models import ModelConfig


def _llama(data: Data, _) -> ModelConfig:
    bias = data.get("attention_bias", False)
    mlp_bias = data.get("mlp_bias", False)
    return ModelConfig(**llama_fields(data), qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias)


def _mistral(data: Data, _) -> ModelConfig:
    """A sliding window in every layer."""
    return ModelConfig(**llama_fields(data), **layer_types(data, lambda i: True))


def _qwen_window(data: Data) -> dict:
    """Windows from `max_window_layers` on, if they are switched on at all."""
    if not data.get("use_sliding_window", False):
        data = {**data, "sliding_window": None}
    first = data.get("max_window_layers", 28)
    return layer_types(data, lambda i: i >= first)


def _qwen2(data: Data, _) -> ModelConfig:
    """Biases on queries, keys and values alone."""
    return ModelConfig(**llama_fields(data), qkv_bias=True, **_qwen_window(data))


def _qwen3(data: Data, _) -> ModelConfig:
    """Normed queries and keys, heads of 128."""
    bias = data.get("attention_bias", False)
    fields = llama_fields({"head_dim": 128, **data})
    window = _qwen_window(data)
    return ModelConfig(**fields, qk_norm=True, qkv_bias=bias, output_bias=bias, **window)


def _phi3(data: Data, _) -> ModelConfig:
    """Fused projections; by its config, a window in every layer and RoPE on part of a head."""
    fields = llama_fields({"rms_norm_eps": 1e-5, **data})
    window = layer_types(data, lambda i: True)
    return ModelConfig(**fields, fused_qkv="sections", mlp="gated_fused", **window)


_ROTARY = (r"rotary_emb\.inv_freq$",)

LLAMA = Family(_llama, LLAMA_NAMES, ignored=_ROTARY)
MISTRAL = Family(_mistral, LLAMA_NAMES, ignored=_ROTARY)
QWEN2 = Family(_qwen2, LLAMA_NAMES)
QWEN3 = Family(_qwen3, {**LLAMA_NAMES, **QK_NORM_NAMES})
_APART = ("/q_proj", "/k_proj", "/v_proj", "/gate_proj", "/up_proj")
PHI3 = Family(
    _phi3,
    {path: name for path, name in LLAMA_NAMES.items() if not path.endswith(_APART)}
    | same_names("model", "self_attn/qkv_proj", "mlp/gate_up_proj"),
)
