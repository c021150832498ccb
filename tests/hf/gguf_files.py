"""GGUF files for tests, written by the gguf package in llama.cpp's row order."""

import json

import gguf
import numpy as np
from safetensors.numpy import load_file

from tests.models.golden import FOLDER

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    module = name.removesuffix(".weight")
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        return f"blk.{layer}.{NAMES[module]}.weight"
    return f"{NAMES[module]}.weight"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Pair neighbouring rows for RoPE, as llama.cpp's converter does for q and k."""
    split = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def write_llama(path, family: str, quant: gguf.GGMLQuantizationType, *, architecture="llama"):
    """Write a golden Llama to `path`, its matrices stored as `quant`."""
    config = json.loads((FOLDER / family / "hf" / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if config["rope_parameters"]["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    for name, value in load_file(FOLDER / family / "hf" / "model.safetensors").items():
        module = name.split(".")[-2]
        value = permute(value, heads[module]) if module in heads else value
        kind = quant if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(value, kind), raw_dtype=kind)
    finish(writer)


def llama3_factors(config) -> np.ndarray:
    """The divisor of each frequency: 1 for short waves, `factor` for long ones (llama.cpp)."""
    rope = config["rope_parameters"]
    length, low, high = (
        rope[key]
        for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    factors = []
    for i in range(0, config["head_dim"], 2):
        wave = 2 * np.pi * rope["rope_theta"] ** (i / config["head_dim"])
        smooth = (length / wave - low) / (high - low)
        if wave < length / high:
            factors.append(1.0)
        elif wave > length / low:
            factors.append(rope["factor"])
        else:
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.asarray(factors, np.float32)


def write_tokenizer(path, tokenizer, pre="smollm", model="gpt2"):
    """Write the metadata of a byte-level BPE `tokenizers.Tokenizer` whose token 0 is special."""
    data = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(data["vocab"], key=data["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(merge) for merge in data["merges"]])
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
