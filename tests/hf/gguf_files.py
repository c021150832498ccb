"""GGUF files for tests, written by the gguf package in llama.cpp's row order."""

import json

import gguf
import numpy as np
from safetensors.numpy import load_file

from tests.models.golden import FOLDER

# model_type -> (architecture in files, of the name map)
ARCHITECTURES = {
    "gemma3_text": ("gemma3", "GEMMA3"),
    "gpt_neox": ("gptneox", "GPTNEOX"),
    "gpt_oss": ("gpt-oss", "GPT_OSS"),
    "mixtral": ("llama", "LLAMA"),
}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Pair neighbouring rows for RoPE, as llama.cpp's converter does for q and k."""
    split = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def write_model(path, family: str, quant: gguf.GGMLQuantizationType, *, architecture=None, **keys):
    """Write a golden model to `path` as llama.cpp's converter does, its matrices as `quant`.

    `keys` replace those of its config.json.
    """
    config = json.loads((FOLDER / family / "hf" / "config.json").read_text()) | keys
    kind = config["model_type"]
    in_files, in_map = ARCHITECTURES.get(kind, (kind, kind.upper()))
    writer = gguf.GGUFWriter(path, architecture or in_files)
    write_keys(writer, kind, config)
    tensors = load_file(FOLDER / family / "hf" / "model.safetensors")
    layers = config.get("num_hidden_layers") or config["n_layer"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[in_map], layers)
    for name, value in converted(kind, config, tensors):
        if not name.startswith("blk."):
            module, _, suffix = name.rpartition(".")
            name = f"{names.get_name(module)}.{suffix}"
        store = quant if value.ndim >= 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(value, store), raw_dtype=store)
    if config.get("rope_parameters", {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    if factors := config.get("factors"):  # of LongRoPE
        for name in ("short", "long"):
            values = np.asarray(factors[f"{name}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", values)
        original = factors["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        stretch = config["max_position_embeddings"] / original
        factor = np.sqrt(1 + np.log(stretch) / np.log(original))
        writer.add_rope_scaling_attn_factors(float(factor))
    finish(writer)


def write_keys(writer: gguf.GGUFWriter, kind: str, config) -> None:
    heads = config.get("num_attention_heads") or config["n_head"]
    hidden = config.get("hidden_size") or config["n_embd"]
    writer.add_block_count(config.get("num_hidden_layers") or config["n_layer"])
    writer.add_context_length(config.get("max_position_embeddings") or 64)
    writer.add_embedding_length(hidden)
    inner = config.get("intermediate_size") or config.get("n_inner")
    writer.add_feed_forward_length(inner or 4 * hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    else:
        writer.add_layer_norm_eps(config.get("layer_norm_eps") or config["layer_norm_epsilon"])
    rope = config.get("rope_parameters")
    if rope:
        rope = rope.get("full_attention", rope)
        writer.add_rope_freq_base(rope["rope_theta"])
        dim = config.get("head_dim") or hidden // heads
        writer.add_rope_dimension_count(int(dim * rope.get("partial_rotary_factor", 1)))
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if "num_local_experts" in config:
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if kind == "gpt_oss":
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    if kind == "gpt_neox":
        writer.add_parallel_residual(config["use_parallel_residual"])
    if kind.startswith("gemma"):
        writer.add_attention_scale(config["query_pre_attn_scalar"] ** -0.5)
        if config["attn_logit_softcapping"]:
            writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
            writer.add_final_logit_softcapping(config["final_logit_softcapping"])
        is_sliding = [t == "sliding_attention" for t in config["layer_types"]]
        writer.add_sliding_window_pattern(is_sliding)


def converted(kind: str, config, tensors):
    """Yield the tensors as llama.cpp's converter names and orders them for the name map."""
    experts: dict[str, list] = {}
    heads = config.get("num_attention_heads") or config["n_head"]
    for name, value in tensors.items():
        if kind in ("llama", "mixtral") and ".self_attn.q_proj." in name:
            value = permute(value, heads)
        if kind in ("llama", "mixtral") and ".self_attn.k_proj." in name:
            value = permute(value, config["num_key_value_heads"])
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if kind == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            value = np.ascontiguousarray(value.T)
        if kind in ("bloom", "gpt_neox") and ".query_key_value." in name:
            split = value.reshape(heads, 3, -1, *value.shape[1:])
            value = np.concatenate([split[:, i].reshape(-1, *value.shape[1:]) for i in range(3)])
        if kind == "bloom":
            name = name.removeprefix("transformer.")
        if kind == "bert":
            name = name.removeprefix("bert.")
            if name.startswith(("cls.", "pooler.")):
                continue
        if kind == "gpt_oss" and ("experts." in name or name.endswith("sinks")):
            yield from gpt_oss_parts(name, value)
        elif ".experts." in name:  # those of a layer come one after the other
            before, _, after = name.partition(".experts.")
            index, _, rest = after.partition(".")
            experts.setdefault(f"{before}.experts.{rest}", []).append((int(index), value))
        else:
            yield name, value
    for name, held in experts.items():
        yield name, np.stack([value for _, value in sorted(held, key=lambda item: item[0])])


def gpt_oss_parts(name: str, value: np.ndarray):
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    if rest.endswith("sinks"):
        yield f"blk.{layer}.attn_sinks.weight", value
        return
    suffix = "bias" if rest.endswith("_bias") else "weight"
    if suffix == "weight":
        value = np.ascontiguousarray(value.swapaxes(1, 2))  # [experts, out, in]
    if "down_proj" in rest:
        yield f"blk.{layer}.ffn_down_exps.{suffix}", value
    else:
        yield f"blk.{layer}.ffn_gate_exps.{suffix}", np.ascontiguousarray(value[:, ::2])
        yield f"blk.{layer}.ffn_up_exps.{suffix}", np.ascontiguousarray(value[:, 1::2])


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
