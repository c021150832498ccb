"""What a decoder-only language model looks like: sizes and switches, free of any file format."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embeddings (arXiv:2104.09864) and how they are stretched to long contexts.

    Attributes:
        theta: base of the geometric series of wavelengths.
        kind: "default"; "linear" (every frequency divided by `factor`); "llama3" (only the low
            frequencies, with a smooth ramp between the two `*_freq_factor` wavelengths); "factors"
            (frequency `i` divided by `factors[i]`, as GGUF files store the llama3 ramp).
        original_length: context length before stretching, in tokens ("llama3" only).
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "factors"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder-only language model, named as in Hugging Face's config.json.

    Attributes:
        head_dim: width of one attention head; `num_attention_heads * head_dim` may differ from
            `hidden_size`.
        num_key_value_heads: heads of keys and values, each shared by
            `num_attention_heads // num_key_value_heads` query heads.
        tie_word_embeddings: the output head is the transposed embedding table.
        scan_layers: one stacked block under `jax.lax.scan` in place of a list of blocks: compiles
            in the time of one layer.
        remat: recompute each block in the backward pass in place of keeping its activations.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    scan_layers: bool = False
    remat: bool = False

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive int")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be divisible by "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")
