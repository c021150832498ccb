"""Checkpoints in GPTQ's and AWQ's formats: their own packers' bytes, and whole models' logits."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import qjax.hf
from qjax.hf.group_config import GroupConfig, read_group_config
from qjax.hf.integer_groups import grouped_like, read_grouped
from tests.hf.group_files import grouped, quantization_config, write_grouped
from tests.models.golden import FOLDER, TOLERANCE, reference

PACKED = load_file(FOLDER.parent / "groups" / "groups.safetensors")
CASES = ("gptq_v1_sym", "gptq_v1_asym", "gptq_v2_sym", "gptq_v2_asym", "awq")
forward = nnx.jit(lambda model, ids: model(ids))


@pytest.mark.parametrize("case", CASES)
def test_weights_decode_as_by_those_who_packed_them(case):
    config = GroupConfig(case.partition("_")[0], 32, offset="v1" in case)
    shape, parts = PACKED[f"{case}.qweight"].shape, {n for n in PACKED if n.startswith(case)}
    like = grouped_like(shape, f"{case}.weight", config, jnp.float16)
    q = read_grouped(PACKED.__getitem__, f"{case}.weight", parts, config, like)
    q.check()
    assert q.format == "int4_asym" and q.block_size == 32
    np.testing.assert_array_equal(q.dequantize(), PACKED[f"{case}.decoded"])


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_groups_of_each_size_are_kept_exactly(method, size):
    w = np.random.default_rng(0).standard_normal((256, 24)).astype(np.float32)
    tensors, decoded = grouped("m", w, method, size)
    config = read_group_config(quantization_config(method, size))
    like = grouped_like(tensors["m.qweight"].shape, "m.weight", config, jnp.float32)
    q = read_grouped(tensors.__getitem__, "m.weight", tensors, config, like)
    np.testing.assert_array_equal(q.dequantize(), decoded)
    # 4 bits, and a float32 step with an 8-bit zero point a group.
    assert q.bits_per_param == 4 + 40 / size


@pytest.mark.parametrize(
    "family, method, options",
    [
        ("llama", "gptq", {"size": 64}),
        ("llama", "awq", {}),
        pytest.param("qwen2", "gptq", {"symmetric": True, "version": 2}, marks=pytest.mark.slow),
        pytest.param("gpt2", "gptq", {}, marks=pytest.mark.slow),
        pytest.param("gemma2", "awq", {}, marks=pytest.mark.slow),
    ],
)
def test_logits_are_those_of_the_decoded_weights(family, method, options, tmp_path):
    packed = write_grouped(FOLDER / family / "hf", tmp_path, method, **options)
    ids = reference(family)["input_ids"]
    model = qjax.hf.from_pretrained(packed, dtype=jnp.float32)
    expected = forward(qjax.hf.from_pretrained(tmp_path / "float"), ids)
    assert np.abs(forward(model, ids) - expected).max() < TOLERANCE
    rows = qjax.report(model).rows
    assert sum(row.format == "int4_asym" for row in rows) >= 8
    if method == "awq":
        scanned = qjax.hf.from_pretrained(packed, dtype=jnp.float32, scan_layers=True)
        assert np.abs(forward(scanned, ids) - expected).max() < TOLERANCE


def test_such_a_model_takes_adapters_and_is_saved(tmp_path):
    packed = write_grouped(FOLDER / "llama" / "hf", tmp_path, "gptq")
    model = qjax.hf.from_pretrained(packed, dtype=jnp.float32)
    model = qjax.add_lora(model, qjax.LoraConfig(rank=4), rngs=nnx.Rngs(0))
    qjax.save(tmp_path / "saved", model)
    loaded = qjax.load(tmp_path / "saved", like=model)
    q, again = (m.layers[1].mlp.up_proj.kernel.q for m in (model, loaded))
    np.testing.assert_array_equal(again.packed, q.packed)
    with pytest.raises(ValueError, match=r"the model has weights in \['int4_asym'\]; use layout"):
        model.save_pretrained(tmp_path / "bnb")
    model.save_pretrained(tmp_path / "decoded", layout="float")
    found = load_file(tmp_path / "decoded" / "model.safetensors")
    for name, w in load_file(tmp_path / "float" / "model.safetensors").items():
        np.testing.assert_array_equal(found[name], w)


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"bits": 8}, NotImplementedError, "bits=8 of 'gptq' is not read; only 4"),
        ({"bits": None}, NotImplementedError, "bits=None"),
        ({"group_size": -1}, NotImplementedError, "group_size=-1 is not read; only .32, 64"),
        ({"group_size": "x"}, ValueError, "group_size='x' must be an int"),
        ({"checkpoint_format": "marlin"}, NotImplementedError, "format='marlin' is not read"),
        ({"is_marlin_format": True}, NotImplementedError, "format='marlin' is not read"),
        ({"pack_dtype": "int64"}, NotImplementedError, "pack_dtype='int64'; only 'int32'"),
        ({"dynamic": {"+:mlp": {"bits": 8}}}, NotImplementedError, r"dynamic=\['\+:mlp'\]"),
        (
            {"quant_method": "awq", "checkpoint_format": "gemv"},
            NotImplementedError,
            "format='gemv' is not read; only .'gemm'",
        ),
    ],
)
def test_what_is_not_read_is_refused_by_name(change, kind, message):
    with pytest.raises(kind, match=message):
        read_group_config(quantization_config("gptq", 32) | change)


UP = "model.layers.0.mlp.up_proj"


def put(part, change):
    def put(tensors):
        tensors[f"{UP}.{part}"] = np.ascontiguousarray(change(tensors[f"{UP}.{part}"]))

    return put


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (
            put("g_idx", lambda g: g[::-1]),
            NotImplementedError,
            "up_proj.g_idx' is not in order.*act",
        ),
        (
            put("qzeros", lambda z: z[:1]),
            ValueError,
            r"qzeros' is int32\[1, 8\]; groups of 32 with 4",
        ),
        (put("scales", lambda s: s[:, :8]), ValueError, r"scales' is float16\[2, 8\]; .*\[2, 64\]"),
        (put("scales", lambda s: s * np.nan), ValueError, "up_proj.scales' holds NaN or inf"),
        (put("qweight", lambda w: w[:4]), ValueError, r"has shape \[64, 32\], its config says"),
        (
            put("qweight", lambda w: w[:6]),
            ValueError,
            "group_size=32 does not divide its 48 inputs",
        ),
        (put("qweight", lambda w: w.astype(np.int64)), ValueError, r"qweight' is int64\[8, 64\]"),
        (lambda t: t.pop(f"{UP}.qzeros"), ValueError, "has no '.*up_proj.qzeros'"),
        (lambda t: t.pop(f"{UP}.qweight"), ValueError, f"lacks 1 tensors, first '{UP}.weight'"),
    ],
)
def test_a_broken_weight_is_named(change, kind, message, tmp_path):
    packed = write_grouped(FOLDER / "llama" / "hf", tmp_path, "gptq")
    tensors = load_file(packed / "model.safetensors")
    change(tensors)
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(kind, match=message):
        qjax.hf.from_pretrained(packed)


def test_act_order_needs_the_groups_of_the_inputs(tmp_path):
    packed = write_grouped(FOLDER / "llama" / "hf", tmp_path, "gptq")
    data = json.loads((packed / "config.json").read_text())
    data["quantization_config"]["desc_act"] = True
    (packed / "config.json").write_text(json.dumps(data))
    qjax.hf.from_pretrained(packed)  # groups that are in order all the same
    tensors = load_file(packed / "model.safetensors")
    del tensors[f"{UP}.g_idx"]
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no '.*up_proj\.g_idx'"):
        qjax.hf.from_pretrained(packed)


def test_a_config_without_such_weights_is_refused(tmp_path):
    write_grouped(FOLDER / "llama" / "hf", tmp_path, "gptq")
    file = tmp_path / "float" / "config.json"
    asked = {"quantization_config": quantization_config("gptq", 32)}
    file.write_text(json.dumps(json.loads(file.read_text()) | asked))
    with pytest.raises(ValueError, match=r"has no \.qweight: nothing of it is in GPTQ"):
        qjax.hf.from_pretrained(tmp_path / "float")
