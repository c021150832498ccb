"""What a transformer looks like: sizes and switches, free of any file format."""

from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin

REMAT_SAVES = ("attention", "stream", "qkv", "gate_up")  # activations of a block
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers, as config.json spells them


def check_types(config: Any) -> None:
    """Raise ValueError for a field of a config that is not of its plain type; ints are floats."""
    for item in fields(config):
        value, kind = getattr(config, item.name), item.type
        options = get_args(kind) or (kind,)
        if get_origin(kind) is Literal:
            fits = isinstance(value, str) and value in options
        else:
            plain = [t for t in options if t in (int, float, bool, str, NoneType)]
            if len(plain) < len(options):
                continue  # a config of its own, or a tuple
            number = isinstance(value, int | float) and not isinstance(value, bool)
            fits = type(value) in plain or (float in plain and number)
        if not fits:
            names = [getattr(option, "__name__", repr(option)) for option in options]
            raise ValueError(f"{item.name}={value!r} must be {' or '.join(names)}")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embeddings (arXiv:2104.09864) and how they are stretched to long contexts.

    Attributes:
        theta: base of the geometric series of wavelengths.
        kind: "default"; "linear" (every frequency divided by `factor`); "llama3" (only the low
            frequencies, with a smooth ramp between the two `*_freq_factor` wavelengths); "yarn"
            (arXiv:2309.00071: a ramp between the frequencies that turn `beta_slow` and `beta_fast`
            times in `original_length`, and cosines and sines scaled by `attention_factor`);
            "longrope" (arXiv:2402.13753: frequency `i` divided by `factors[i]`, by
            `long_factors[i]` in texts longer than `original_length`; scaled likewise).
        original_length: context length before stretching, in tokens.
        attention_factor: None is the method's own, by `factor`: 0.1 ln(factor) + 1 for YaRN,
            sqrt(1 + ln(factor) / ln(original_length)) for LongRoPE.
        truncate: round the ends of YaRN's ramp to whole frequencies.
        partial: the part of each head, from its start, that is rotated.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192
    factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    partial: float = 1.0

    def __post_init__(self):
        check_types(self)
        if not (self.theta > 0 and self.factor > 0 and 0 < self.partial <= 1):
            raise ValueError(
                f"theta={self.theta} and factor={self.factor} must be positive, "
                f"partial={self.partial} from 0 to 1"
            )
        for name in ("factors", "long_factors"):
            for value in getattr(self, name):
                if not isinstance(value, int | float) or not value > 0:
                    raise ValueError(f"{name} holds {value!r}, must hold positive numbers")

    def check_factors(self, head_dim: int) -> None:
        """Raise ValueError unless there is a factor for each frequency of a head."""
        needed = len(range(0, int(head_dim * self.partial), 2))
        for name in ("factors", "long_factors"):
            if self.kind == "longrope" and len(getattr(self, name)) != needed:
                raise ValueError(
                    f"rope {name} has {len(getattr(self, name))} entries, "
                    f"head_dim={head_dim} needs {needed}"
                )


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in the place of the MLP.

    Attributes:
        count: experts in a layer.
        per_token: experts that a token is sent to; their outputs are weighed by the softmax of
            their router logits.
        clamped: gpt_oss' MLP, (up + 1) * gate * sigmoid(alpha * gate) with both clamped to
            `limit`, gate and up interleaved in one kernel, with biases on all; False is a SwiGLU.
    """

    count: int
    per_token: int
    clamped: bool = False
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self):
        check_types(self)
        if not 1 <= self.per_token <= self.count:
            raise ValueError(f"per_token={self.per_token} must be from 1 to count={self.count}")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a stack of transformer blocks, named as in Hugging Face's config.json.

    The defaults are those of a Llama.

    Attributes:
        head_dim: width of one attention head; `num_attention_heads * head_dim` may differ from
            `hidden_size`.
        num_key_value_heads: heads of keys and values, each shared by
            `num_attention_heads // num_key_value_heads` query heads.
        max_position_embeddings: longest text, in tokens; None is no limit.
        embedding_size: width of the token embedding where it differs from `hidden_size`, to which
            two linear layers then project it, and back before the head.
        embedding_scale: factor of the looked-up embedding.
        embedding_norm: normalize the looked-up embedding.
        positions: how tokens know their place: "rope", "learned" (a table), "alibi"
            (arXiv:2108.12409) or "none".
        position_offset: rows in front of the learned table that are no positions.
        positions_from_mask: by default count the real tokens, not the columns.
        rope: of all layers, or of the full layers where `sliding_rope` is given.
        norm: "rms"; "rms_offset", whose scale is 1 + its parameter; or "layer".
        norm_eps: added to the variance.
        block: where the norms are: "pre", "post", "sandwich" (before and after each half) or
            "parallel" (attention and MLP read the same stream).
        final_norm: normalize the stream before the head.
        fused_qkv: one linear layer makes queries, keys and values: "sections" holds all queries,
            then all keys, then all values; "heads" holds the three of each head together.
        qkv_bias, output_bias: biases of attention's linear layers.
        qk_norm: normalize each head's queries and keys before rotating them.
        attention_scale: factor of the attention logits; None is 1 / sqrt(head_dim).
        attention_softcap, logit_softcap: x becomes cap * tanh(x / cap).
        attention_sinks: a learned logit per head that takes part in the softmax and has no value.
        sliding_window: real tokens that a query of a sliding layer sees, itself included.
        layer_types: "full_attention" or "sliding_attention" for each layer; None is all full.
        mlp: "gated", "gated_fused" (gate and up in one linear layer) or "plain".
        experts: a mixture in the place of the MLP.
        tie_word_embeddings: the output head is the transposed embedding table.
        scan_layers: one stacked block under `jax.lax.scan` in place of a list of blocks: compiles
            in the time of one layer.
        remat: recompute each block in the backward pass in place of keeping its activations.
        remat_saves: with `remat`, activations of a block that are kept all the same: any of
            "attention" (its result), "stream" (between attention and MLP), "qkv", "gate_up".
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int | None = 2048
    embedding_size: int | None = None
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    positions: Literal["rope", "learned", "alibi", "none"] = "rope"
    position_offset: int = 0
    positions_from_mask: bool = False
    rope: RopeConfig = RopeConfig()
    sliding_rope: RopeConfig | None = None
    norm: Literal["rms", "rms_offset", "layer"] = "rms"
    norm_eps: float = 1e-6
    block: Literal["pre", "post", "sandwich", "parallel"] = "pre"
    final_norm: bool = True
    fused_qkv: Literal["sections", "heads"] | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    attention_sinks: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    mlp: Literal["gated", "gated_fused", "plain"] = "gated"
    mlp_bias: bool = False
    hidden_act: str = "silu"
    experts: ExpertsConfig | None = None
    logit_softcap: float | None = None
    tie_word_embeddings: bool = False
    scan_layers: bool = False
    remat: bool = False
    remat_saves: tuple[str, ...] = ()

    def __post_init__(self):
        check_types(self)
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
            if value < 1:
                raise ValueError(f"{name}={value!r} must be a positive int")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be divisible by "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")
        for rope in filter(None, (self.rope, self.sliding_rope)):
            rope.check_factors(self.head_dim)
        if len(self.kinds) != self.num_hidden_layers or not set(self.kinds) <= {FULL, SLIDING}:
            raise ValueError(
                f"layer_types={self.layer_types} must say {FULL!r} or {SLIDING!r} for each of "
                f"num_hidden_layers={self.num_hidden_layers}"
            )
        if self.positions == "learned" and not self.max_position_embeddings:
            raise ValueError("positions='learned' needs max_position_embeddings")
        if not set(self.remat_saves) <= set(REMAT_SAVES):
            raise ValueError(f"remat_saves={self.remat_saves} must be among {REMAT_SAVES}")
        if SLIDING in self.kinds and (self.sliding_window or 0) < 1:
            raise ValueError(f"sliding_window={self.sliding_window!r} must be a positive int")

    @property
    def position_rows(self) -> int:
        """Rows of a learned table of positions."""
        return (self.max_position_embeddings or 0) + self.position_offset

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer."""
        return self.layer_types or (FULL,) * self.num_hidden_layers
