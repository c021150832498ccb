"""Gemma 2 and 3: scaled embeddings, norms of 1 + weight before and after each half of a block."""

import math
from typing import Any

from qjax.hf.families.base import (
    LLAMA_NAMES,
    QK_NORM_NAMES,
    Data,
    Family,
    layer_types,
    llama_fields,
    rope_config,
    same_names,
)
from qjax.models import ModelConfig, RopeConfig
from qjax.models.config import FULL, SLIDING

_NAMES = {
    **LLAMA_NAMES,
    **same_names("model", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
}


def _gemma(data: Data) -> dict[str, Any]:
    """Return what both generations share."""
    data = {"head_dim": 256, "tie_word_embeddings": True, **data}
    bias = data.get("attention_bias", False)
    fields = llama_fields(data) | dict(
        hidden_act=data.get("hidden_activation") or data.get("hidden_act", "gelu_pytorch_tanh"),
        qkv_bias=bias,
        output_bias=bias,
        norm="rms_offset",
        block="sandwich",
        embedding_scale=math.sqrt(data["hidden_size"]),
        attention_scale=data.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=data.get("attn_logit_softcapping"),
        logit_softcap=data.get("final_logit_softcapping"),
    )
    return fields


def _gemma2(data: Data, _) -> ModelConfig:
    """Capped logits; every second layer, from the first, has a window."""
    return ModelConfig(**_gemma(data), **layer_types(data, lambda i: i % 2 == 0))


def _gemma3(data: Data, _) -> ModelConfig:
    """Normed queries and keys; five layers with a window, of shorter RoPE waves, to one without."""
    pattern = data.get("_sliding_window_pattern", data.get("sliding_window_pattern", 6))
    data = {"rope_theta": 1e6, **data}
    if data.get("rope_parameters"):
        sliding_rope = rope_config(data, SLIDING)
    else:
        sliding_rope = RopeConfig(theta=data.get("rope_local_base_freq", 10000.0))
    fields = _gemma(data) | dict(rope=rope_config(data, FULL), sliding_rope=sliding_rope)
    window = layer_types(data, lambda i: (i + 1) % pattern != 0)
    return ModelConfig(**fields, qk_norm=True, **window)


GEMMA2 = Family(_gemma2, _NAMES)
GEMMA3 = Family(_gemma3, {**_NAMES, **QK_NORM_NAMES})
