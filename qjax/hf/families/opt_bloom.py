"""More decoders with LayerNorms, biases and a plain MLP: OPT and Bloom."""

from qjax.hf.families.base import (
    FUSED_NAMES,
    Data,
    Family,
    block_names,
    plain_fields,
    refuse,
    sizes,
)
from qjax.models import ModelConfig


def _opt(data: Data, _) -> ModelConfig:
    """Positions of real tokens, from row 2; opt-350m: norms behind, projected embeddings."""
    refuse(data, layer_norm_elementwise_affine=True)
    before = data.get("do_layer_norm_before", True)
    bias = data.get("enable_bias", True)
    width = data.get("word_embed_proj_dim", data["hidden_size"])
    return ModelConfig(
        **sizes({**data, "intermediate_size": data["ffn_dim"]}),
        **plain_fields(1e-5, qkv_bias=bias, output_bias=bias, mlp_bias=bias),
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
        **plain_fields(data.get("layer_norm_epsilon", 1e-5)),
        positions="alibi",
        embedding_norm=True,
        fused_qkv="heads",
        hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings=data.get("tie_word_embeddings", True),
    )


OPT = Family(
    _opt,
    block_names(
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
    block_names(
        {
            "embed_tokens": "transformer.word_embeddings",
            "embed_norm": "transformer.word_embeddings_layernorm",
            "norm": "transformer.ln_f",
            "lm_head": "lm_head",
        },
        "transformer.h.{}",
        FUSED_NAMES
        | {
            "self_attn/qkv_proj": "self_attention.query_key_value",
            "self_attn/o_proj": "self_attention.dense",
        },
    ),
    prefix="transformer.",
)
