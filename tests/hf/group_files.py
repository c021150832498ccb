"""Checkpoints in GPTQ's and AWQ's layouts, packed in plain numpy from the published definitions."""

import json
import pathlib

import numpy as np
from safetensors.numpy import load_file, save_file

_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def group_parameters(w: np.ndarray, size: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and zero points [in / size, out] of a weight [in, out]."""
    groups = w.reshape(-1, size, w.shape[1])
    low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
    if symmetric:
        scale = np.maximum(-low, high) / 7.5
        zero = np.full(scale.shape, 8)
    else:
        scale = (high - low) / 15
        zero = np.round(-low / scale)
    return scale.astype(np.float16), zero.astype(np.uint32)


def pack(codes: np.ndarray, order=range(8)) -> np.ndarray:
    """Pack eight columns in each int32, column `order[i]` in bits 4 i to 4 i + 3."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for i, column in enumerate(order):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def grouped(module: str, w: np.ndarray, method: str, size: int, symmetric=False, version=1):
    """Return the tensors of a weight [in, out], and what it decodes to in float32."""
    scale, zero = group_parameters(w, size, symmetric)
    group = np.arange(len(w)) // size
    steps = scale.astype(np.float32)[group]
    codes = np.clip(np.round(w / steps) + zero[group], 0, 15).astype(np.uint32)
    if method == "awq":
        tensors = {"qweight": pack(codes, _AWQ_ORDER), "qzeros": pack(zero, _AWQ_ORDER)}
    else:
        stored = pack(zero).view(np.uint32) - np.uint32(0x11111111 if version == 1 else 0)
        tensors = {"qweight": pack(codes.T).T, "qzeros": stored.view(np.int32)}
        tensors["g_idx"] = group.astype(np.int32)
    tensors["scales"] = scale
    decoded = (codes.astype(np.float32) - zero[group].astype(np.float32)) * steps
    return {f"{module}.{k}": np.ascontiguousarray(v) for k, v in tensors.items()}, decoded


def quantization_config(method: str, size: int, version=1) -> dict:
    common = {"quant_method": method, "bits": 4, "group_size": size}
    if method == "awq":
        return common | {"version": "gemm", "zero_point": True, "modules_to_not_convert": None}
    kind = {"checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    return common | kind | {"desc_act": False, "sym": True, "damp_percent": 0.01}


def write_grouped(
    source: pathlib.Path, folder: pathlib.Path, method: str, size=32, symmetric=False, version=1
) -> pathlib.Path:
    """Write a golden float model to folder/packed, and what that decodes to, to folder/float."""
    tensors = load_file(source / "model.safetensors")
    data = json.loads((source / "config.json").read_text())
    conv1d = data["model_type"] == "gpt2"  # which stores [in, out]
    packed, decoded = dict(tensors), dict(tensors)
    for name, w in tensors.items():
        dense = ("_proj.weight", "c_attn.weight", "c_fc.weight", "c_proj.weight")
        if name.endswith(dense):
            w = w if conv1d else w.T
            module = name.removesuffix(".weight")
            del packed[name]
            made, value = grouped(module, w, method, size, symmetric, version)
            packed |= made
            decoded[name] = np.ascontiguousarray(value if conv1d else value.T)
    config = quantization_config(method, size, version)
    for name, held, extra in (
        ("packed", packed, {"quantization_config": config}),
        ("float", decoded, {}),
    ):
        (folder / name).mkdir()
        save_file(held, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(data | extra))
    return folder / "packed"
