"""The tensors of a GGUF file: which are a tensor of Hugging Face's, and how to get it back.

Source: llama.cpp, convert_hf_to_gguf.py, `modify_tensors` of each model.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qjax.hf.extras import require
from qjax.hf.families import Family

# Not weights: divisors of RoPE's frequencies.
FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
_ARCHITECTURES = {
    "gemma3_text": "GEMMA3",
    "gpt_neox": "GPTNEOX",
    "mixtral": "LLAMA",
}
# gpt-oss' parameters that are no layers; of its experts llama.cpp splits the first in two.
_GPT_OSS_OWN = r"model\.layers\.(\d+)\.(mlp\.experts\..*|self_attn\.sinks.*)"
_GPT_OSS = {
    "mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "mlp.experts.gate_up_proj_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
    "mlp.experts.down_proj": ("ffn_down_exps.weight",),
    "mlp.experts.down_proj_bias": ("ffn_down_exps.bias",),
    "self_attn.sinks": ("attn_sinks.weight",),
}


class Parts(NamedTuple):
    """The tensors of a GGUF file that one of Hugging Face's is made of; of which expert."""

    names: tuple[str, ...]
    expert: int | None = None


def tensor_parts(
    kind: str, family: Family, layers: int, experts: int, stored: Collection[str]
) -> dict[str, Parts]:
    """Return, for each tensor of the family that the file has, what it is made of."""
    gguf = require("gguf", "gguf")
    architecture = gguf.MODEL_ARCH[_ARCHITECTURES.get(kind, kind.upper())]
    names = gguf.get_tensor_name_map(architecture, layers)
    found = {}
    for template in set(family.names.values()):
        for i in range(layers) if "{}" in template else range(1):
            for e in range(experts) if "{e}" in template else (None,):
                module = template.format(i, e=e)
                for suffix in ("", ".weight", ".bias"):
                    parts = _parts(kind, family, names, module + suffix, e)
                    if parts and all(name in stored for name in parts.names):
                        found[module + suffix] = parts
    return found


def _parts(kind: str, family: Family, names, tensor: str, expert: int | None) -> Parts | None:
    if kind == "gpt_oss" and (match := re.fullmatch(_GPT_OSS_OWN, tensor)):
        held = _GPT_OSS.get(match[2], ())
        return Parts(tuple(f"blk.{match[1]}.{name}" for name in held)) if held else None
    spelled = tensor if expert is None else tensor.replace(f"experts.{expert}.", "experts.")
    for name in (spelled, spelled.removeprefix(family.prefix)):
        module, dot, suffix = name.rpartition(".")
        found = names.get_name(module) if suffix in ("weight", "bias") else None
        if found:
            return Parts((found + dot + suffix,), expert)
    return None


def restore(data: Mapping[str, Any], name: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return a tensor as Hugging Face's file has it.

    Args:
        data: the config.json.
        name: of the tensor.
        parts: of the GGUF file.
    """
    kind, value = data["model_type"], parts[0]
    if kind in ("llama", "mixtral") and (heads := _rotated_heads(data, name)):
        return _half_rotation(value, heads)
    if kind in ("gemma2", "gemma3_text") and name.endswith("norm.weight"):
        return value - 1  # stored as the factor
    if kind == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return np.ascontiguousarray(value.T)
    if kind in ("bloom", "gpt_neox") and ".query_key_value." in name:
        heads = data.get("n_head") or data["num_attention_heads"]
        return _by_heads(value, heads)
    if kind == "gpt_oss" and ".mlp.experts." in name:
        return _experts(name, parts)
    return value


def _rotated_heads(data: Mapping[str, Any], name: str) -> int | None:
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    key = heads.get(name.split(".")[-2])
    return data[key] if key else None


def _half_rotation(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order: it pairs neighbours in RoPE, we pair the halves of a head."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def _by_heads(value: np.ndarray, heads: int) -> np.ndarray:
    """Put the queries, keys and values of each head together; there they are in three sections."""
    sections = value.reshape(3, heads, -1, *value.shape[1:])
    return np.ascontiguousarray(sections.swapaxes(0, 1)).reshape(value.shape)


def _experts(name: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Interleave the outputs of gate and up, and turn [experts, out, in] to [experts, in, out]."""
    value = parts[0]
    if len(parts) == 2:
        value = np.stack(parts, axis=2).reshape(value.shape[0], -1, *value.shape[2:])
    return value if name.endswith("_bias") else np.ascontiguousarray(value.swapaxes(1, 2))
