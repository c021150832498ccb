"""Mixtures of experts: Mixtral and gpt-oss."""

from qjax.hf.families.base import (
    LLAMA_NAMES,
    Data,
    Family,
    layer_types,
    llama_fields,
    same_names,
)
from qjax.models import ModelConfig
from qjax.models.config import ExpertsConfig

_MIXTRAL_NAMES = {
    **LLAMA_NAMES,
    "layers/{}/mlp/router": "model.layers.{}.block_sparse_moe.gate",
    **{
        f"layers/{{}}/mlp/experts/{ours}/kernel": (
            f"model.layers.{{}}.block_sparse_moe.experts.{{e}}.{theirs}.weight"
        )
        for ours, theirs in {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}.items()
    },
}

# The experts' arrays are parameters, not layers, of one tensor stored [experts, in, out].
_GPT_OSS_NAMES = {
    **LLAMA_NAMES,
    **same_names("model", "mlp/router"),
    "layers/{}/self_attn/sinks": "model.layers.{}.self_attn.sinks",
    **{
        f"layers/{{}}/mlp/experts/{name}/{leaf}": f"model.layers.{{}}.mlp.experts.{name}{suffix}"
        for name in ("gate_up_proj", "down_proj")
        for leaf, suffix in {"kernel": "", "bias": "_bias"}.items()
    },
}


def _mixtral(data: Data, _) -> ModelConfig:
    """A Mistral whose MLP is a mixture."""
    experts = ExpertsConfig(data.get("num_local_experts", 8), data.get("num_experts_per_tok", 2))
    fields = llama_fields({"rms_norm_eps": 1e-5, **data})
    return ModelConfig(**fields, experts=experts, **layer_types(data, lambda i: True))


def _gpt_oss(data: Data, _) -> ModelConfig:
    """Clamped experts with biases, attention sinks, a window in every second layer."""
    experts = ExpertsConfig(
        count=data["num_local_experts"],
        per_token=data.get("num_experts_per_tok", 4),
        clamped=True,
        alpha=data.get("swiglu_alpha", 1.702),
        limit=data.get("swiglu_limit", 7.0),
    )
    fields = llama_fields({"rms_norm_eps": 1e-5, "head_dim": 64, **data})
    bias = data.get("attention_bias", True)
    window = layer_types(data, lambda i: i % 2 == 0)
    return ModelConfig(
        **fields, experts=experts, attention_sinks=True, qkv_bias=bias, output_bias=bias, **window
    )


MIXTRAL = Family(_mixtral, _MIXTRAL_NAMES)
GPT_OSS = Family(_gpt_oss, _GPT_OSS_NAMES)
