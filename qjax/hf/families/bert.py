"""BERT: an encoder with norms behind each half of a block, with or without its head."""

from qjax.hf.families.base import Data, Family, refuse, sizes
from qjax.models import BertConfig, MaskedLM

_LAYER = "bert.encoder.layer.{}"
_NAMES = {
    "embed_tokens": "bert.embeddings.word_embeddings",
    "embed_positions": "bert.embeddings.position_embeddings",
    "embed_types": "bert.embeddings.token_type_embeddings",
    "embed_norm": "bert.embeddings.LayerNorm",
    "layers/{}/self_attn/q_proj": f"{_LAYER}.attention.self.query",
    "layers/{}/self_attn/k_proj": f"{_LAYER}.attention.self.key",
    "layers/{}/self_attn/v_proj": f"{_LAYER}.attention.self.value",
    "layers/{}/self_attn/o_proj": f"{_LAYER}.attention.output.dense",
    "layers/{}/input_layernorm": f"{_LAYER}.attention.output.LayerNorm",
    "layers/{}/mlp/up_proj": f"{_LAYER}.intermediate.dense",
    "layers/{}/mlp/down_proj": f"{_LAYER}.output.dense",
    "layers/{}/post_attention_layernorm": f"{_LAYER}.output.LayerNorm",
    "transform/dense": "cls.predictions.transform.dense",
    "transform/norm": "cls.predictions.transform.LayerNorm",
    "head_bias": "cls.predictions.bias",
}


def _bert(data: Data, tensors) -> BertConfig:
    refuse(data, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    return BertConfig(
        **sizes(data),
        norm="layer",
        norm_eps=data.get("layer_norm_eps", 1e-12),
        block="post",
        positions="learned",
        mlp="plain",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        hidden_act=data.get("hidden_act", "gelu"),
        tie_word_embeddings=True,
        type_vocab_size=data.get("type_vocab_size", 2),
        head=any(name.startswith("cls.predictions.") for name in tensors),
    )


BERT = Family(
    _bert,
    _NAMES,
    model=MaskedLM,
    prefix="bert.",
    # The pooler and the next-sentence head, the tied head's copies, and a buffer.
    ignored=(
        r"^bert\.pooler\.",
        r"^cls\.seq_relationship\.",
        r"^cls\.predictions\.decoder\.",
        r"position_ids$",
    ),
    renamed={".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"},
)
