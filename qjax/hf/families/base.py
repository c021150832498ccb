"""What every family needs: the `Family` record, and how config.json spells RoPE and windows."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from qjax.models import CausalLM, RopeConfig
from qjax.models.config import FULL, SLIDING

Data = Mapping[str, Any]  # a config.json
Names = Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """One `model_type`: how its config.json reads and what its tensors are called.

    Attributes:
        config: from the config.json and the names of the tensors beside it.
        names: path in the model -> name in the file. A path of a layer stands for all its arrays
            (`weight`, `bias` behind the name); a path of one array for just that one, stored in our
            order of axes. "{}" is the layer's index; "{e}" in a name is the expert's, each stored
            [out, in].
        model: the class that is built from the config.
        prefix: what names begin with, but in files of a model saved without its head.
        renamed: ends of tensors' names in old files -> as they are now.
        ignored: regular expressions of tensors that are no weights of ours.
        conv1d: linear layers are stored [in, out] while in float (GPT-2).
        float_layers: patterns of paths that are never quantized by default.
    """

    config: Callable[[Data, Collection[str]], Any]
    names: Names
    model: type = CausalLM
    prefix: str = ""
    renamed: Names = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    conv1d: bool = False
    float_layers: tuple[str, ...] = ()


def sizes(data: Data) -> dict[str, Any]:
    """Return the fields that most families spell as a Llama does."""
    heads = data["num_attention_heads"]
    return dict(
        vocab_size=data["vocab_size"],
        hidden_size=data["hidden_size"],
        intermediate_size=data["intermediate_size"],
        num_hidden_layers=data["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=data.get("num_key_value_heads") or heads,
        head_dim=data.get("head_dim") or data["hidden_size"] // heads,
        max_position_embeddings=data.get("max_position_embeddings", 2048),
    )


def refuse(data: Data, **supported: Any) -> None:
    """Raise NotImplementedError where config.json asks for anything but the supported value."""
    for key, value in supported.items():
        if data.get(key, value) != value:
            raise NotImplementedError(
                f"config.json has {key}={data[key]!r}; only {value!r} is implemented"
            )


def layer_types(data: Data, is_sliding: Callable[[int], bool]) -> dict[str, Any]:
    """Return the window and the kinds of layers: those listed, else those by index.

    Args:
        is_sliding: whether the layer at an index has the window, for files that do not list it.
    """
    window, count = data.get("sliding_window"), data["num_hidden_layers"]
    kinds = data.get("layer_types")
    if kinds is None:
        kinds = [SLIDING if window and is_sliding(i) else FULL for i in range(count)]
    if SLIDING not in kinds:
        return {}
    return dict(sliding_window=window, layer_types=tuple(kinds))


def rope_config(data: Data, kind: str | None = None) -> RopeConfig:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    Args:
        kind: of layers, where `rope_parameters` holds one for each.
    """
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    rope = rope.get(kind, rope)
    theta = rope.get("rope_theta", data.get("rope_theta", 10000.0))
    partial = rope.get("partial_rotary_factor", data.get("partial_rotary_factor", 1.0))
    common: dict[str, Any] = {"theta": theta, "partial": partial}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling == "default":
        return RopeConfig(**common)
    if scaling == "linear":
        return RopeConfig(kind="linear", factor=rope["factor"], **common)
    if scaling == "llama3":
        return RopeConfig(
            kind="llama3",
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_length=rope["original_max_position_embeddings"],
            **common,
        )
    if scaling in ("longrope", "su"):
        return _longrope(data, rope, common)
    if scaling == "yarn":
        return _yarn(data, rope, common)
    raise NotImplementedError(
        f"rope_type={scaling!r} in config.json: only default, linear, llama3, yarn and longrope"
    )


def _yarn(data: Data, rope: Data, common: dict[str, Any]) -> RopeConfig:
    length, factor = rope.get("original_max_position_embeddings"), rope["factor"]
    attention = rope.get("attention_factor")
    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if attention is None and mscale and mscale_all:
        log = 0.1 * math.log(factor) if factor > 1 else 0.0
        attention = (mscale * log + 1) / (mscale_all * log + 1)
    return RopeConfig(
        kind="yarn",
        factor=factor,
        original_length=length or data["max_position_embeddings"],
        beta_fast=rope.get("beta_fast") or 32.0,
        beta_slow=rope.get("beta_slow") or 1.0,
        attention_factor=attention,
        truncate=rope.get("truncate", True),
        **common,
    )


def _longrope(data: Data, rope: Data, common: dict[str, Any]) -> RopeConfig:
    length = data["max_position_embeddings"]
    original = rope.get("original_max_position_embeddings") or data.get(
        "original_max_position_embeddings", length
    )
    return RopeConfig(
        kind="longrope",
        factor=rope.get("factor") or length / original,
        original_length=original,
        factors=tuple(rope["short_factor"]),
        long_factors=tuple(rope["long_factor"]),
        attention_factor=rope.get("attention_factor"),
        **common,
    )


def llama_fields(data: Data) -> dict[str, Any]:
    """Return the fields of a Llama, which most later families change a few of."""
    return dict(
        **sizes(data),
        norm_eps=data.get("rms_norm_eps", 1e-6),
        rope=rope_config(data),
        hidden_act=data.get("hidden_act", "silu"),
        tie_word_embeddings=data.get("tie_word_embeddings", False),
    )


def same_names(prefix: str, *modules: str) -> dict[str, str]:
    """Return names of modules of a layer that the file calls as we do."""
    return {f"layers/{{}}/{m}": f"{prefix}.layers.{{}}.{m.replace('/', '.')}" for m in modules}


LLAMA_NAMES: Names = {
    "embed_tokens": "model.embed_tokens",
    **same_names(
        "model",
        "input_layernorm",
        "self_attn/q_proj",
        "self_attn/k_proj",
        "self_attn/v_proj",
        "self_attn/o_proj",
        "post_attention_layernorm",
        "mlp/gate_proj",
        "mlp/up_proj",
        "mlp/down_proj",
    ),
    "norm": "model.norm",
    "lm_head": "lm_head",
}

QK_NORM_NAMES: Names = same_names("model", "self_attn/q_norm", "self_attn/k_norm")


_BIASES = dict(qkv_bias=True, output_bias=True, mlp_bias=True)


def plain_fields(norm_eps: float, **changes: Any) -> dict[str, Any]:
    """Return the fields of a decoder with LayerNorms, biases and a plain MLP."""
    return dict(norm="layer", norm_eps=norm_eps, mlp="plain", **(_BIASES | changes))


def block_names(outside: Names, layer: str, inside: Names) -> Names:
    """Return names of modules outside the layers, and of those of a layer behind its prefix."""
    blocks = {f"layers/{{}}/{ours}": f"{layer}.{theirs}" for ours, theirs in inside.items()}
    return {**outside, **blocks}


# Of the blocks of GPT-NeoX and Bloom.
FUSED_NAMES = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp/up_proj": "mlp.dense_h_to_4h",
    "mlp/down_proj": "mlp.dense_4h_to_h",
}
