"""Decoders with LayerNorms, biases and a plain MLP: GPT-2, GPT-Neo and GPT-NeoX."""

from qjax.hf.families.base import (
    FUSED_NAMES,
    Data,
    Family,
    block_names,
    layer_types,
    plain_fields,
    refuse,
    rope_config,
    sizes,
)
from qjax.models import ModelConfig
from qjax.models.config import FULL, SLIDING


def _gpt2(data: Data, _) -> ModelConfig:
    refuse(
        data,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    hidden = data["n_embd"]
    renamed = dict(
        hidden_size=hidden,
        intermediate_size=data.get("n_inner") or 4 * hidden,
        num_hidden_layers=data["n_layer"],
        num_attention_heads=data["n_head"],
        max_position_embeddings=data.get("n_positions", 1024),
    )
    return ModelConfig(
        **sizes({**data, **renamed}),
        **plain_fields(data.get("layer_norm_epsilon", 1e-5)),
        positions="learned",
        fused_qkv="sections",
        hidden_act=data.get("activation_function", "gelu_new"),
        tie_word_embeddings=data.get("tie_word_embeddings", True),
    )


def _gpt_neo(data: Data, _) -> ModelConfig:
    """Unscaled attention logits; by its config, a window in every second layer."""
    layers = data["num_layers"]
    spelled = data.get("attention_layers") or [
        kind for kinds, times in data["attention_types"] for _ in range(times) for kind in kinds
    ]
    hidden = data["hidden_size"]
    renamed = dict(
        intermediate_size=data.get("intermediate_size") or 4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=data["num_heads"],
        sliding_window=data.get("window_size", 256),
        layer_types=[SLIDING if kind == "local" else FULL for kind in spelled],
    )
    data = {**data, **renamed}
    return ModelConfig(
        **sizes(data),
        **plain_fields(data.get("layer_norm_epsilon", 1e-5), qkv_bias=False),
        **layer_types(data, lambda i: False),
        positions="learned",
        attention_scale=1.0,
        hidden_act=data.get("activation_function", "gelu_new"),
        tie_word_embeddings=data.get("tie_word_embeddings", True),
    )


def _gpt_neox(data: Data, _) -> ModelConfig:
    """RoPE on a quarter of each head; attention and MLP in parallel."""
    partial = data.get("rotary_pct", 0.25)
    theta = data.get("rotary_emb_base", 10000.0)
    rope = rope_config({"partial_rotary_factor": partial, "rope_theta": theta, **data})
    bias = data.get("attention_bias", True)
    return ModelConfig(
        **sizes(data),
        **plain_fields(data.get("layer_norm_eps", 1e-5), qkv_bias=bias, output_bias=bias),
        rope=rope,
        block="parallel" if data.get("use_parallel_residual", True) else "pre",
        fused_qkv="heads",
        hidden_act=data.get("hidden_act", "gelu"),
        tie_word_embeddings=data.get("tie_word_embeddings", False),
    )


_GPT_OUTSIDE = {
    "embed_tokens": "transformer.wte",
    "embed_positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
_GPT_MLP = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "mlp/up_proj": "mlp.c_fc",
    "mlp/down_proj": "mlp.c_proj",
}
_MASKS = (r"\.attn\.(attention\.)?(bias|masked_bias)$",)  # buffers, not weights

GPT2 = Family(
    _gpt2,
    block_names(
        _GPT_OUTSIDE,
        "transformer.h.{}",
        _GPT_MLP | {"self_attn/qkv_proj": "attn.c_attn", "self_attn/o_proj": "attn.c_proj"},
    ),
    prefix="transformer.",
    ignored=_MASKS,
    conv1d=True,
)
GPT_NEO = Family(
    _gpt_neo,
    block_names(
        _GPT_OUTSIDE,
        "transformer.h.{}",
        _GPT_MLP
        | {f"self_attn/{p}_proj": f"attn.attention.{p}_proj" for p in "qkv"}
        | {"self_attn/o_proj": "attn.attention.out_proj"},
    ),
    prefix="transformer.",
    ignored=_MASKS,
)
GPT_NEOX = Family(
    _gpt_neox,
    block_names(
        {
            "embed_tokens": "gpt_neox.embed_in",
            "norm": "gpt_neox.final_layer_norm",
            "lm_head": "embed_out",
        },
        "gpt_neox.layers.{}",
        FUSED_NAMES
        | {
            "self_attn/qkv_proj": "attention.query_key_value",
            "self_attn/o_proj": "attention.dense",
        },
    ),
    ignored=(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",),
)
