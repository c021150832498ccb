"""Decoders with LayerNorms, biases and a plain MLP: GPT-2, GPT-Neo, GPT-NeoX, OPT and Bloom."""

from typing import Any

from qjax.hf.families.base import Data, Family, Names, layer_types, refuse, rope_config, sizes
from qjax.models import ModelConfig
from qjax.models.config import FULL, SLIDING

_BIASES = dict(qkv_bias=True, output_bias=True, mlp_bias=True)


def _plain(norm_eps: float, **changes: Any) -> dict[str, Any]:
    return dict(norm="layer", norm_eps=norm_eps, mlp="plain", **(_BIASES | changes))


def _names(outside: Names, layer: str, inside: Names) -> Names:
    blocks = {f"layers/{{}}/{ours}": f"{layer}.{theirs}" for ours, theirs in inside.items()}
    return {**outside, **blocks}


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
        **_plain(data.get("layer_norm_epsilon", 1e-5)),
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
        **_plain(data.get("layer_norm_epsilon", 1e-5), qkv_bias=False),
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
        **_plain(data.get("layer_norm_eps", 1e-5), qkv_bias=bias, output_bias=bias),
        rope=rope,
        block="parallel" if data.get("use_parallel_residual", True) else "pre",
        fused_qkv="heads",
        hidden_act=data.get("hidden_act", "gelu"),
        tie_word_embeddings=data.get("tie_word_embeddings", False),
    )


def _opt(data: Data, _) -> ModelConfig:
    """Positions of real tokens, from row 2; opt-350m: norms behind, projected embeddings."""
    refuse(data, layer_norm_elementwise_affine=True)
    before = data.get("do_layer_norm_before", True)
    bias = data.get("enable_bias", True)
    width = data.get("word_embed_proj_dim", data["hidden_size"])
    return ModelConfig(
        **sizes({**data, "intermediate_size": data["ffn_dim"]}),
        **_plain(1e-5, qkv_bias=bias, output_bias=bias, mlp_bias=bias),
        block="pre" if before else "post",
        final_norm=before and not data.get("_remove_final_layer_norm", False),
        embedding_size=None if width == data["hidden_size"] else width,
        positions="learned",
        position_offset=2,
        positions_from_mask=True,
        hidden_act=data.get("activation_function", "relu"),
        tie_word_embeddings=data.get("tie_word_embeddings", True),
    )


def _bloom(data: Data, _) -> ModelConfig:
    """ALiBi, so no longest text; a norm behind the embedding."""
    refuse(data, apply_residual_connection_post_layernorm=False)
    hidden = data.get("hidden_size") or data["n_embed"]
    renamed = dict(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=data.get("n_layer") or data["num_hidden_layers"],
        num_attention_heads=data.get("n_head") or data["num_attention_heads"],
        max_position_embeddings=None,
    )
    return ModelConfig(
        **sizes({**data, **renamed}),
        **_plain(data.get("layer_norm_epsilon", 1e-5)),
        positions="alibi",
        embedding_norm=True,
        fused_qkv="heads",
        hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings=data.get("tie_word_embeddings", True),
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
    _names(
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
    _names(
        _GPT_OUTSIDE,
        "transformer.h.{}",
        _GPT_MLP
        | {f"self_attn/{p}_proj": f"attn.attention.{p}_proj" for p in "qkv"}
        | {"self_attn/o_proj": "attn.attention.out_proj"},
    ),
    prefix="transformer.",
    ignored=_MASKS,
)
_FUSED = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp/up_proj": "mlp.dense_h_to_4h",
    "mlp/down_proj": "mlp.dense_4h_to_h",
}
GPT_NEOX = Family(
    _gpt_neox,
    _names(
        {
            "embed_tokens": "gpt_neox.embed_in",
            "norm": "gpt_neox.final_layer_norm",
            "lm_head": "embed_out",
        },
        "gpt_neox.layers.{}",
        _FUSED
        | {
            "self_attn/qkv_proj": "attention.query_key_value",
            "self_attn/o_proj": "attention.dense",
        },
    ),
    ignored=(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",),
)
OPT = Family(
    _opt,
    _names(
        {
            "embed_tokens": "model.decoder.embed_tokens",
            "embed_positions": "model.decoder.embed_positions",
            "project_in": "model.decoder.project_in",
            "project_out": "model.decoder.project_out",
            "norm": "model.decoder.final_layer_norm",
            "lm_head": "lm_head",
        },
        "model.decoder.layers.{}",
        {f"self_attn/{p}_proj": f"self_attn.{p}_proj" for p in "qkv"}
        | {
            "self_attn/o_proj": "self_attn.out_proj",
            "input_layernorm": "self_attn_layer_norm",
            "post_attention_layernorm": "final_layer_norm",
            "mlp/up_proj": "fc1",
            "mlp/down_proj": "fc2",
        },
    ),
    prefix="model.",
)
BLOOM = Family(
    _bloom,
    _names(
        {
            "embed_tokens": "transformer.word_embeddings",
            "embed_norm": "transformer.word_embeddings_layernorm",
            "norm": "transformer.ln_f",
            "lm_head": "lm_head",
        },
        "transformer.h.{}",
        _FUSED
        | {
            "self_attn/qkv_proj": "self_attention.query_key_value",
            "self_attn/o_proj": "self_attention.dense",
        },
    ),
    prefix="transformer.",
)
