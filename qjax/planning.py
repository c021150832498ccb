"""How much device memory QLoRA training takes, before anything is downloaded.

The sum of what is stored and what a step holds at its peak. The factors of a block's working
memory were fitted to the compiler's figures for four runs on an H100, which it meets within 5 %
(benchmarks/NOTES-end-to-end.md).
"""

import dataclasses
import math

from qjax.models.config import ModelConfig

_GIB = 2**30
_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # of a parameter: NF4, block 64, doubly quantized scales
_HALF = 2  # bytes of a bfloat16
# Arrays of a block's backward pass that live at once, counted in arrays of that kind.
_GATE_UP, _QKV, _STREAM = 4, 1, 4
_MOMENTS = {"adamw": 8, "adamw8bit": 2 + 2 * 4 / 256}  # bytes of a parameter
# Hidden, MLP, layers, heads, key-value heads, head width, vocabulary; tied embeddings.
_KNOWN = {
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128, 128256, True),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 128, 32000, False),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128, 128256, False),
    "llama-2-13b": (5120, 13824, 40, 40, 40, 128, 32000, False),
    "codellama-34b": (8192, 22016, 48, 64, 8, 128, 32000, False),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128, 128256, False),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """An estimate.

    Attributes:
        shape: what was planned for, in words.
        parts: bytes by what they are for.
    """

    shape: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        rows = [*self.parts.items(), ("total", self.total)]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {size / _GIB:7.2f} GiB" for name, size in rows]
        return "\n".join([self.shape, *lines])


def plan(
    model: float | ModelConfig,
    *,
    seq: int = 2048,
    batch: int = 1,
    rank: int = 16,
    optimizer: str = "adamw",
) -> Plan:
    """Estimate the peak device memory of QLoRA training on one GPU.

    Planned for: NF4 with double quantization, bfloat16 head, embeddings and activations, float32
    adapters on all linear layers of the blocks, fused projections, `scan_layers`, `remat` with
    `remat_saves=("attention",)`, and `model.loss`. What CUDA itself takes is not in it.

    Args:
        model: a config of the Llama kind, or a number of parameters, for which the nearest Llama
            stands, with more or fewer layers where it is not near.
        seq: tokens of a row.
        batch: rows.
        rank: of the adapters.
        optimizer: "adamw" or "adamw8bit".

    Raises:
        ValueError: a size below 1, or an unknown optimizer.

    Example:
        >>> round(qjax.plan(70e9, seq=2048, batch=1).total / 2**30)
        48
    """
    for name, value in (("seq", seq), ("batch", batch), ("rank", rank)):
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more")
    if optimizer not in _MOMENTS:
        raise ValueError(f"optimizer={optimizer!r} must be one of {list(_MOMENTS)}")
    c = model if isinstance(model, ModelConfig) else _nearest(model)
    tokens, layers, width = seq * batch, c.num_hidden_layers, c.num_attention_heads * c.head_dim
    qkv = width + 2 * c.num_key_value_heads * c.head_dim
    hidden, inner = c.hidden_size, c.intermediate_size
    linear, head = _sizes(c)
    # A of rank columns for each of seven layers, and B of rank rows.
    adapters = layers * rank * (5 * hidden + width + inner + qkv + 2 * inner + 2 * hidden)
    kept = _HALF * (hidden + width) + 4 * c.num_attention_heads
    working = tokens * _HALF * (_GATE_UP * 2 * inner + _QKV * qkv + _STREAM * hidden)
    parts = {
        "4-bit weights": linear * _BITS / 8,
        "embeddings and head": head * _HALF,
        "adapters": adapters * 4.0,
        "optimizer": adapters * _MOMENTS[optimizer],
        "gradients": 2 * adapters * 4.0,  # and the updates
        "kept activations": layers * tokens * kept,
        "a block at work": working + 2 * inner * hidden * _HALF,  # and its largest weight decoded
    }
    named = f"{(linear + head) / 1e9:.3g}e9 parameters, {layers} layers of {hidden}"
    return Plan(f"{named}; {batch} x {seq} tokens, rank {rank}, {optimizer}", parts)


def _sizes(c: ModelConfig) -> tuple[int, int]:
    """Return the parameters of the linear layers of the blocks, and of embeddings and head."""
    width, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    block = c.hidden_size * (2 * width + 2 * kv + 3 * c.intermediate_size)
    tables = 1 if c.tie_word_embeddings else 2
    return c.num_hidden_layers * block, tables * c.hidden_size * c.vocab_size


def _nearest(params: float) -> ModelConfig:
    if not params >= 1e6:
        raise ValueError(f"params={params:g} must be a number of parameters, 1e6 or more")
    configs = [_config(*sizes) for sizes in _KNOWN.values()]
    best = min(configs, key=lambda c: abs(math.log(sum(_sizes(c)) / params)))
    linear, tables = _sizes(best)
    if abs(math.log((linear + tables) / params)) < 0.08:
        return best
    layers = round(best.num_hidden_layers * (params - tables) / linear)
    return dataclasses.replace(best, num_hidden_layers=max(1, layers))


def _config(hidden, inner, layers, heads, kv_heads, head_dim, vocab, tied) -> ModelConfig:
    return ModelConfig(
        vocab, hidden, inner, layers, heads, kv_heads, head_dim, tie_word_embeddings=tied
    )
