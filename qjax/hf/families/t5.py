"""T5, and T5 1.1 with its gated MLP."""

import dataclasses

from qjax.hf.families.base import Data, Family
from qjax.models import Seq2SeqLM, T5Config


def _stack(name: str, mlp_at: int, gated: bool) -> dict[str, str]:
    """Return the names of one of the two stacks, whose MLP is its block's layer `mlp_at`."""
    block, mlp = f"{name}.block.{{}}", f"{name}.block.{{}}.layer.{mlp_at}"
    up = {"gate_proj": "wi_0", "up_proj": "wi_1"} if gated else {"up_proj": "wi"}
    return {
        f"{name}/relative_bias/table": (
            f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias"
        ),
        f"{name}/norm": f"{name}.final_layer_norm",
        f"{name}/layers/{{}}/input_layernorm": f"{block}.layer.0.layer_norm",
        f"{name}/layers/{{}}/post_attention_layernorm": f"{mlp}.layer_norm",
        **_attention(f"{name}/layers/{{}}/self_attn", f"{block}.layer.0.SelfAttention"),
        **{
            f"{name}/layers/{{}}/mlp/{ours}": f"{mlp}.DenseReluDense.{theirs}"
            for ours, theirs in {**up, "down_proj": "wo"}.items()
        },
    }


def _attention(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}/{p}_proj": f"{theirs}.{p}" for p in "qkvo"}


def _names(gated: bool) -> dict[str, str]:
    block = "decoder.block.{}.layer.1"
    return {
        "embed_tokens": "shared",
        **_stack("encoder", 1, gated),
        **_stack("decoder", 2, gated),
        "decoder/layers/{}/cross_layernorm": f"{block}.layer_norm",
        **_attention("decoder/layers/{}/cross_attn", f"{block}.EncDecAttention"),
        "lm_head": "lm_head",
    }


def _feed_forward(data: Data) -> tuple[bool, str]:
    """Read `feed_forward_proj`, such as "relu" or "gated-gelu" (by tanh); return (gated, act)."""
    spelled = data.get("feed_forward_proj", "relu")
    if not isinstance(spelled, str):
        raise ValueError(f"config.json: feed_forward_proj={spelled!r} must be a string")
    gated, name = spelled.startswith("gated-"), spelled.removeprefix("gated-")
    return gated, "gelu_new" if spelled == "gated-gelu" else name


def _t5(data: Data, tensors) -> T5Config:
    """Unscaled attention logits with a relative bias.

    A head of its own is neither tied nor scaled, whatever config.json says.
    """
    gated, act = _feed_forward(data)
    return T5Config(
        vocab_size=data["vocab_size"],
        hidden_size=data["d_model"],
        intermediate_size=data["d_ff"],
        num_hidden_layers=data["num_layers"],
        num_attention_heads=data["num_heads"],
        num_key_value_heads=data["num_heads"],
        head_dim=data["d_kv"],
        max_position_embeddings=None,
        positions="none",
        norm_eps=data.get("layer_norm_epsilon", 1e-6),
        attention_scale=1.0,
        mlp="gated" if gated else "plain",
        hidden_act=act,
        tie_word_embeddings="lm_head.weight" not in tensors,
        num_decoder_layers=data.get("num_decoder_layers") or data["num_layers"],
        relative_buckets=data.get("relative_attention_num_buckets", 32),
        relative_distance=data.get("relative_attention_max_distance", 128),
        decoder_start_token_id=data.get("decoder_start_token_id") or 0,
    )


_PLAIN = Family(
    _t5,
    _names(gated=False),
    model=Seq2SeqLM,
    # Copies of `shared`, and a table that old files hold and nothing reads.
    ignored=(r"^(encoder|decoder)\.embed_tokens\.", r"EncDecAttention\.relative_attention_bias\."),
    float_layers=(r"mlp/down_proj",),  # as in transformers, which keeps `wo` in float32
)
_GATED = dataclasses.replace(_PLAIN, names=_names(gated=True))


def t5(data: Data) -> Family:
    """Return the family of this config: the gated MLP has other names."""
    return _GATED if _feed_forward(data)[0] else _PLAIN
