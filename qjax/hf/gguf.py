"""A GGUF file of llama.cpp: the model's sizes from its metadata, tensors decoded one at a time."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from qjax.core.qtensor import QTensor
from qjax.hf.extras import require
from qjax.hf.families.llama import LLAMA
from qjax.models import ModelConfig, RopeConfig

_LLAMA_NAMES = {
    "embed_tokens": "token_embd",
    "layers/{}/input_layernorm": "blk.{}.attn_norm",
    "layers/{}/self_attn/q_proj": "blk.{}.attn_q",
    "layers/{}/self_attn/k_proj": "blk.{}.attn_k",
    "layers/{}/self_attn/v_proj": "blk.{}.attn_v",
    "layers/{}/self_attn/o_proj": "blk.{}.attn_output",
    "layers/{}/post_attention_layernorm": "blk.{}.ffn_norm",
    "layers/{}/mlp/gate_proj": "blk.{}.ffn_gate",
    "layers/{}/mlp/up_proj": "blk.{}.ffn_up",
    "layers/{}/mlp/down_proj": "blk.{}.ffn_down",
    "norm": "output_norm",
    "lm_head": "output",
}
_ROPE_FACTORS = "rope_freqs.weight"  # not a weight: the llama3 ramp, one divisor a frequency


class GGUFFile:
    """Reads one tensor at a time from the memory-mapped file.

    Attributes:
        config: what the model looks like.
        dtype: "float32": whatever the file stores, tensors are decoded to it.
        family: a Llama with the names of GGUF.
        tensors: names of the weights.
        data, bnb, packed: nothing: a GGUF file has neither config.json nor weights of bitsandbytes.
    """

    dtype = "float32"
    data = bnb = None
    packed: Mapping[str, frozenset[str]] = MappingProxyType({})
    family = dataclasses.replace(LLAMA, names=_LLAMA_NAMES)

    def __init__(self, path: Path):
        self.path = path
        self._metadata = Metadata(path)
        architecture = self._metadata.get("general.architecture")
        if architecture != "llama":
            raise ValueError(
                f"{path}: general.architecture={architecture!r} is not known; known: ['llama']"
            )
        self._stored = {tensor.name: tensor for tensor in self._metadata.reader.tensors}
        self.config = self._config()
        self.tensors = frozenset(self._stored) - {_ROPE_FACTORS}

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as float32 in torch's layout, [out, in] for a linear layer."""
        weight = self._decode(name)
        if name.endswith((".attn_q.weight", ".attn_k.weight")):
            query = name.endswith(".attn_q.weight")
            c = self.config
            return _half_rotation(weight, c.num_attention_heads if query else c.num_key_value_heads)
        return weight

    def packed_like(self, name: str) -> QTensor:
        """Never called: there is nothing in `packed`."""
        raise KeyError(name)

    read_packed = packed_like

    def _decode(self, name: str) -> np.ndarray:
        tensor = self._stored[name]
        try:
            return require("gguf.quants", "gguf").dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise NotImplementedError(
                f"{self.path}: tensor {name!r} is {tensor.tensor_type.name}, "
                "which the gguf package cannot decode"
            ) from None

    def _config(self) -> ModelConfig:
        get = self._metadata.get
        heads, hidden = get("llama.attention.head_count"), get("llama.embedding_length")
        return ModelConfig(
            vocab_size=int(self._stored["token_embd.weight"].shape[1]),
            hidden_size=hidden,
            intermediate_size=get("llama.feed_forward_length"),
            num_hidden_layers=get("llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=get("llama.attention.head_count_kv", heads),
            head_dim=get("llama.attention.key_length", hidden // heads),
            max_position_embeddings=get("llama.context_length"),
            norm_eps=get("llama.attention.layer_norm_rms_epsilon"),
            rope=self._rope(),
            tie_word_embeddings="output.weight" not in self._stored,
        )

    def _rope(self) -> RopeConfig:
        get = self._metadata.get
        theta = get("llama.rope.freq_base", 10000.0)
        scaling = get("llama.rope.scaling.type", "none")
        if _ROPE_FACTORS in self._stored:
            factors = tuple(float(f) for f in self._decode(_ROPE_FACTORS))
            return RopeConfig(theta=theta, kind="factors", factors=factors)
        if scaling == "linear":
            return RopeConfig(theta=theta, kind="linear", factor=get("llama.rope.scaling.factor"))
        if scaling != "none":
            raise NotImplementedError(f"{self.path}: llama.rope.scaling.type={scaling!r}")
        return RopeConfig(theta=theta)


class Metadata:
    """The key-value pairs at the head of a GGUF file, as Python values."""

    def __init__(self, path: Path):
        gguf = require("gguf", "gguf")
        try:
            self.reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise ValueError(f"{path} is not a whole GGUF file: {error}") from None
        self.path = path

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value; a missing key without a default is an error that names it."""
        field = self.reader.get_field(key)
        if field is not None:
            return field.contents()
        if default is None:
            raise ValueError(f"{self.path} has no metadata key {key!r}")
        return default


def _half_rotation(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order: it pairs neighbours in RoPE, we pair the halves of a head."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)
