"""4-bit models: bitsandbytes' checkpoints as they are, and float ones quantized as they stream."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import qjax.hf
from qjax.core.config import QuantConfig
from qjax.hf.bnb_config import is_skipped, read_bnb_config
from qjax.models.rope import frequencies
from qjax.nn.nnx_param import QuantParam
from qjax.swap.nnx_merge import dequantize_model
from tests.models.golden import FAMILIES, FOLDER, TOLERANCE, error, reference, write_bnb
from tests.models.test_families import slow_but

EXACT = QuantConfig(double_quant=False, compute_dtype=jnp.float32)
forward = nnx.jit(lambda model, ids, **kwargs: model(ids, **kwargs))


def inputs(family, rows=2):
    ref = reference(family)
    extra = {"bert": ["token_type_ids"]}.get(family, [])
    extra += ["decoder_input_ids"] if family.startswith("t5") else []
    return ref["input_ids"][:rows], {name: ref[name][:rows] for name in extra}


def check(model, family, expected, rows=2):
    ids, extra = inputs(family, rows)
    assert error(forward(model, ids, **extra), expected).max() < TOLERANCE


def packed_paths(model) -> set[str]:
    state = nnx.to_flat_state(nnx.state(model, QuantParam))
    return {"/".join(map(str, path)) for path, _ in state}


@pytest.mark.parametrize("family", slow_but(FAMILIES, ("llama", "qwen2", "gpt2", "t5")))
def test_a_bitsandbytes_checkpoint_gives_its_own_logits(family, tmp_path):
    model = qjax.hf.from_pretrained(write_bnb(family, tmp_path))
    check(model, family, reference(family)["logits_nf4"])


@pytest.mark.parametrize("family", slow_but(FAMILIES[:-1], ("llama",)))
def test_a_bitsandbytes_checkpoint_gives_its_own_tokens(family, tmp_path):
    model, ref = qjax.hf.from_pretrained(write_bnb(family, tmp_path)), reference(family)
    out = model.generate(ref["input_ids"], max_new_tokens=12)
    np.testing.assert_array_equal(out, ref["greedy_nf4"])


@pytest.mark.parametrize("family", slow_but(FAMILIES, ("bert", "opt_postnorm", "gemma3", "phi3")))
def test_float_weights_quantized_on_the_way_give_the_golden_logits(family):
    # As bitsandbytes leaves experts alone, so did whoever made these logits.
    exclude = "experts" if family in ("mixtral", "gpt_oss") else None
    config = QuantConfig(double_quant=False, compute_dtype=jnp.float32, exclude=exclude)
    model = qjax.hf.from_pretrained(FOLDER / family / "hf", config=config)
    check(model, family, reference(family)["logits_nf4_nodq"], rows=1)


@pytest.mark.parametrize("scan_layers", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_quantized_in_the_order_they_are_stored_in(family, scan_layers, tmp_path):
    folder = write_bnb(family, tmp_path)
    model = qjax.hf.from_pretrained(folder, config=EXACT, scan_layers=scan_layers)
    check(model, family, reference(family)["logits_nf4_experts"])
    assert any("experts" in path for path in packed_paths(model))


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.startswith("t5")])
def test_scanned_layers_give_the_same_logits(family, tmp_path):
    model = qjax.hf.from_pretrained(write_bnb(family, tmp_path), scan_layers=True)
    check(model, family, reference(family)["logits_nf4"])


def test_bytes_are_taken_as_they_are(tmp_path):
    folder = write_bnb("qwen2", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    model = qjax.hf.from_pretrained(folder)
    # K = 160 is no multiple of 64, so blocks straddle rows; K = 64 is.
    for name, layout in (("mlp.down_proj", "flat"), ("self_attn.q_proj", "rows")):
        part, layer = name.split(".")
        q = getattr(getattr(model.layers[1], part), layer).kernel.q
        stored = f"model.layers.1.{name}.weight"
        assert q.layout == layout
        np.testing.assert_array_equal(q.packed.reshape(-1, 1), tensors[stored])
        np.testing.assert_array_equal(q.scales.codes.reshape(-1), tensors[f"{stored}.absmax"])
        np.testing.assert_array_equal(q.scales.absmax, tensors[f"{stored}.nested_absmax"])
        state = json.loads(bytes(tensors[f"{stored}.quant_state.bitsandbytes__nf4"]))
        assert float(q.scales.offset) == state["nested_offset"]
        assert q.shape == tuple(state["shape"][::-1])


def test_a_bfloat16_checkpoint_decodes_to_bfloat16():
    model = qjax.hf.from_pretrained(FOLDER / "llama" / "bnb_bf16", dtype=jnp.float32)
    assert model.layers[0].mlp.up_proj.kernel.q.dtype == jnp.bfloat16
    model = dequantize_model(model)  # bfloat16 weights, computed in float32, as the golden logits
    # The golden model had been cast to bfloat16 as a whole, its RoPE frequencies too.
    freqs = frequencies(model.config.rope, model.config.head_dim)
    factors = tuple((freqs / np.asarray(jnp.asarray(freqs, jnp.bfloat16), np.float32)).tolist())
    plain = {"kind": "longrope", "attention_factor": 1.0}
    rope = dataclasses.replace(model.config.rope, factors=factors, long_factors=factors, **plain)
    model.config = dataclasses.replace(model.config, rope=rope)
    check(model, "llama", reference("llama")["logits_nf4_bf16ckpt"])


def test_what_transformers_keeps_in_float_stays_in_float():
    model = qjax.hf.from_pretrained(FOLDER / "t5" / "hf", config=QuantConfig())
    kept = {path for path in packed_paths(model) if path.endswith("down_proj/kernel")}
    assert not kept and "decoder/layers/1/cross_attn/q_proj/kernel" in packed_paths(model)
    model = qjax.hf.from_pretrained(FOLDER / "t5" / "hf", config=QuantConfig(include="down_proj"))
    assert len(packed_paths(model)) == 4


def test_a_dict_of_bitsandbytes_stands_for_a_config():
    asked = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": ["model.layers.0", "down_proj"],
    }
    model = qjax.hf.from_pretrained(FOLDER / "llama" / "hf", config=asked)
    assert packed_paths(model) == {
        f"layers/1/{m}/kernel"
        for m in ("mlp/gate_proj", "mlp/up_proj", *(f"self_attn/{p}_proj" for p in "qkvo"))
    }
    layer = model.layers[1].mlp.up_proj
    assert layer.kernel.q.format == "fp4" and not layer.kernel.q.double_quant
    assert layer.compute_dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "module, skip, skipped",
    [
        ("model.layers.1.mlp", ("model.layers.1",), True),
        ("model.layers.10.mlp", ("model.layers.1",), False),
        ("model.layers.1.mlp.down_proj", ("down_proj",), True),
        ("vision_tower.model", ("model",), True),
        ("lm_head", None, False),
    ],
)
def test_modules_are_skipped_as_in_transformers(module, skip, skipped):
    assert is_skipped(module, skip) is skipped


@pytest.mark.parametrize(
    "data, kind, message",
    [
        ({"load_in_4bit": True, "bits": 4}, ValueError, r"unknown keys \['bits'\]; known"),
        ({}, ValueError, "load_in_4bit=False and load_in_8bit=False; one must be true"),
        ({"load_in_4bit": True, "load_in_8bit": True}, ValueError, "one must be true"),
        ({"quant_method": "gptq"}, NotImplementedError, "quant_method='gptq' is not read"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, ValueError, "nf5"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "float7"}, ValueError, "data type"),
    ],
)
def test_a_config_that_cannot_be_is_refused(data, kind, message):
    with pytest.raises(kind, match=message):
        read_bnb_config(data)


def test_eight_bits_are_taken_as_they_are_and_written_so(tmp_path):
    folder, name = FOLDER / "llama" / "hf", "model.layers.0.mlp.up_proj"
    tensors = load_file(folder / "model.safetensors")
    for module in [n.removesuffix(".weight") for n in tensors if "_proj" in n]:
        w = tensors[f"{module}.weight"]
        scale = np.abs(w).max(axis=1)
        tensors[f"{module}.weight"] = np.round(w / scale[:, None] * 127).astype(np.int8)
        tensors |= {f"{module}.SCB": scale, f"{module}.weight_format": np.asarray(0, np.uint8)}
    codes, scale = tensors[f"{name}.weight"], tensors[f"{name}.SCB"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    data = json.loads((folder / "config.json").read_text())
    asked = {"load_in_8bit": True, "quant_method": "bitsandbytes", "llm_int8_threshold": 5.0}
    data["quantization_config"] = asked
    (tmp_path / "config.json").write_text(json.dumps(data))
    model = qjax.hf.from_pretrained(tmp_path)
    layer = model.layers[0].mlp.up_proj
    np.testing.assert_array_equal(layer.kernel.q.packed, codes)
    assert layer.kernel.q.int8_threshold == 5.0 and layer.compute_dtype == jnp.float16
    # One product, and one division, each rounded to float32.
    np.testing.assert_allclose(layer.kernel[...].T, codes * (scale[:, None] / 127.0), rtol=3e-7)
    model.save_pretrained(tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(ours[key], value)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert written.items() >= asked.items() and not written["load_in_4bit"]
    tensors[f"{name}.weight_format"] = np.asarray(2, np.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj.weight' has weight_format=2; only 0"):
        qjax.hf.from_pretrained(tmp_path)


def test_eight_bits_without_their_scales_are_refused(tmp_path):
    folder = FOLDER / "llama" / "hf"
    tensors = load_file(folder / "model.safetensors")
    tensors[Q] = np.ones(tensors[Q].shape, np.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"up_proj.weight' is int8, must be .* need .*up_proj.SCB"):
        qjax.hf.from_pretrained(tmp_path)


def test_a_config_of_eight_bits_makes_them():
    asked = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    model = qjax.hf.from_pretrained(FOLDER / "llama" / "hf", config=asked)
    w = load_file(FOLDER / "llama" / "hf" / "model.safetensors")[Q]
    q = model.layers[0].mlp.up_proj.kernel.q
    assert q.format == "int8" and q.int8_threshold == float("inf")
    np.testing.assert_array_equal(q.scales[:, 0], np.abs(w).max(axis=1))
    # Half a code, and the rounding of the product.
    step = np.asarray(q.scales)[:, :1] / 127
    assert (np.abs(np.asarray(q.dequantize()).T - w) <= 0.5 * step * (1 + 1e-5)).all()


def test_formats_of_which_bitsandbytes_knows_nothing_are_not_written(tmp_path):
    config = QuantConfig(overrides={"layers/0": {"format": "int4"}})
    model = qjax.hf.from_pretrained(FOLDER / "llama" / "hf", config=config)
    with pytest.raises(ValueError, match=r"the model has weights in \['int4', 'nf4'\]; use"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


Q = "model.layers.0.mlp.up_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"


def state(**changes):
    def change(tensors):
        data = json.loads(bytes(tensors[STATE])) | changes
        tensors[STATE] = np.frombuffer(json.dumps(data).encode(), np.uint8)

    return change


def drop(name):
    return lambda tensors: tensors.pop(name)


def cut(name):
    return lambda tensors: tensors.update({name: np.ascontiguousarray(tensors[name][:-1])})


def put(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    "change, message",
    [
        (state(typo=1), r"has keys \[.*'typo'\], must be"),
        (
            state(blocksize=128),
            r"absmax' is uint8\[64\]; shape \[64, 64\] in blocks of 128 needs 32",
        ),
        (state(blocksize=100), "blocksize=100 must be a power of two"),
        (state(shape=[64]), r"shape=\[64\] must be two positive ints"),
        (state(shape=[32, 128]), "has shape .32, 128., its config says .64, 64."),
        (state(dtype="int8"), "dtype='int8' must be one of"),
        (state(quant_type="fp4"), "quant_type='fp4' must be the name's"),
        (state(nested_offset=float("nan")), "nested_offset=nan must be a finite number"),
        (state(nested_blocksize=128), "nested_blocksize=128 .* must be 256"),
        (put(STATE, np.frombuffer(b"{", np.uint8)), "is not JSON"),
        (put(STATE, np.frombuffer(b"[]", np.uint8)), "a list, not a JSON object"),
        (put(f"{Q}.quant_map", np.zeros(16, np.float32)), "is not the table of its format"),
        (put(f"{Q[:-7]}.bias.absmax", np.zeros(3, np.float32)), "without a quant_state"),
        (put(STATE[:-3] + "fp4", np.zeros(3, np.uint8)), "has two quant states"),
        (drop(f"{Q}.absmax"), "has no '.*absmax'"),
        (drop(Q), f"lacks 1 tensors, first .{Q}"),
        (drop(f"{Q}.nested_quant_map"), "has no '.*nested_quant_map'"),
        (drop(STATE), "of a 4-bit weight without a quant_state"),
        (cut(f"{Q}.absmax"), r"absmax' is uint8\[63\]; .* needs 64"),
        (cut(f"{Q}.nested_absmax"), "needs 1 float32"),
        (cut(Q), r"is uint8\[2047, 1\]; .* needs 2048"),
    ],
)
def test_a_broken_4bit_weight_is_named(change, message, tmp_path):
    folder = write_bnb("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        qjax.hf.from_pretrained(folder)


def test_nan_in_a_weight_is_named(tmp_path):
    tensors = load_file(FOLDER / "llama" / "hf" / "model.safetensors")
    tensors[Q][3, 5] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((FOLDER / "llama/hf/config.json").read_text())
    with pytest.raises(ValueError, match=f"{Q} holds NaN or inf"):
        qjax.hf.from_pretrained(tmp_path, config=QuantConfig())


def test_an_include_that_matches_nothing_is_named():
    with pytest.raises(ValueError, match="include='no_such' matches no"):
        qjax.hf.from_pretrained(FOLDER / "llama" / "hf", config=QuantConfig(include="no_such"))
    with pytest.raises(TypeError, match="config must be a QuantConfig or a dict, got str"):
        qjax.hf.from_pretrained(FOLDER / "llama" / "hf", config="nf4")
