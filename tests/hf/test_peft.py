"""Adapters of PEFT: logits and gradients as there, files written as there."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import qjax.hf
from qjax.nn.lora import LoraConfig
from qjax.swap.nnx_lora import add_lora
from tests.models.golden import FOLDER, TOLERANCE, error, reference, write_bnb
from tests.models.test_families import forward

slow = pytest.mark.slow
ADAPTERS = [
    ("llama", "patterns"),  # DoRA, a regular expression, ranks, alphas, lm_head replaced
    ("gpt2", "dora"),  # all-linear, Conv1D, ln_f replaced
    ("mixtral", "lora_experts"),
    pytest.param("llama", "lora", marks=slow),
    pytest.param("llama", "rslora", marks=slow),
    pytest.param("llama", "dora", marks=slow),
    pytest.param("llama", "layers", marks=slow),
    pytest.param("llama_tied", "tied", marks=slow),
    pytest.param("gpt2", "lora", marks=slow),
    pytest.param("mixtral", "lora_down", marks=slow),
    pytest.param("gpt_oss", "lora_experts", marks=slow),
]
WRITTEN = [
    ("llama", "lora"),
    ("llama", "dora"),
    ("gpt2", "lora"),
    ("mixtral", "lora_experts"),
    ("gpt_oss", "lora_experts"),
    ("mixtral", "lora_down"),
]
NF4_ADAPTERS = [
    ("llama", "dora"),
    ("gpt2", "lora"),
    pytest.param("llama", "lora", marks=slow),
    pytest.param("llama", "rslora", marks=slow),
    pytest.param("qwen2", "lora", marks=slow),
    pytest.param("mixtral", "lora", marks=slow),
    pytest.param("mixtral", "lora_experts", marks=slow),
]


def load(family, **options):
    return qjax.hf.from_pretrained(FOLDER / family / "hf", **options)


@pytest.fixture
def adapter(tmp_path):
    """A writable copy of a golden adapter of the Llama."""
    return shutil.copytree(FOLDER / "llama" / "adapter_lora", tmp_path / "adapter")


def loss_of(logits, ids):
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)
    return -picked.mean()


@pytest.mark.parametrize("family, name", ADAPTERS)
def test_logits_loss_and_gradients_equal_peft(family, name, tmp_path):
    """Gradients are put in the place of the adapter and written: names and axes are the file's."""
    model = qjax.hf.load_adapter(load(family), FOLDER / family / f"adapter_{name}")
    ids = reference(family)["input_ids"]
    graphdef, adapter, rest = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(adapter):
        logits = nnx.merge(graphdef, adapter, rest)(ids)
        return loss_of(logits, ids), logits

    (loss, logits), grads = run(adapter)
    expected = load_file(FOLDER / family / f"peft_{name}.safetensors")
    # A mean of cross-entropies, of logits within TOLERANCE.
    np.testing.assert_allclose(loss, expected.pop("loss"), atol=TOLERANCE)
    golden = expected.pop("logits", None)
    golden = reference(family)[f"logits_{name}"] if golden is None else golden
    assert error(logits, golden).max() < TOLERANCE
    qjax.hf.save_adapter(nnx.merge(graphdef, grads, rest), tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    rename = lambda n: n.removeprefix("grad/").replace("vector.weight", "vector")  # noqa: E731
    wanted = {rename(n): gradient for n, gradient in expected.items()}
    if name == "tied":  # the table's copy
        del found["base_model.model.lm_head.weight"]
    assert set(found) == set(wanted)
    largest = max(np.abs(g).max() for g in wanted.values())
    for tensor, gradient in wanted.items():
        # Sums over 48 tokens of float32 products, whose own error is some 1e-5 of the largest.
        np.testing.assert_allclose(found[tensor], gradient, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("family, name", NF4_ADAPTERS)
def test_logits_on_a_4bit_base_equal_peft(family, name, tmp_path):
    model = qjax.hf.from_pretrained(write_bnb(family, tmp_path))
    qjax.hf.load_adapter(model, FOLDER / family / f"adapter_{name}")
    ids = reference(family)["input_ids"]
    logits = forward(model, ids, np.ones_like(ids))
    assert error(logits, reference(family)[f"logits_nf4_{name}"]).max() < TOLERANCE


@pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("family, name", WRITTEN)
def test_an_adapter_is_written_as_it_was_read(family, name, scan_layers, tmp_path):
    theirs = FOLDER / family / f"adapter_{name}"
    model = qjax.hf.load_adapter(load(family, scan_layers=scan_layers), theirs)
    qjax.hf.save_adapter(model, tmp_path)
    ours = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert ours == (theirs / "adapter_model.safetensors").read_bytes()
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = json.loads((theirs / "adapter_config.json").read_text())
    for key in ("target_modules", "target_parameters"):
        ours, theirs = written.pop(key) or [], expected.pop(key) or []
        assert all(any(o.endswith(t) for t in theirs) for o in ours) and bool(ours) == bool(theirs)
    assert len(written.pop("rank_pattern")) == 2 * len(expected.pop("rank_pattern"))
    assert written.items() <= expected.items()


def test_patterns_of_rank_and_alpha_are_read_and_written(adapter, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"rank_pattern": {"layers.1.mlp.up_proj": 2}, "alpha_pattern": {"k_proj": 3}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    tensors[name.format("A")] = tensors[name.format("A")][:2].copy()
    tensors[name.format("B")] = tensors[name.format("B")][:, :2].copy()
    save_file(tensors, adapter / "adapter_model.safetensors")
    model = qjax.hf.load_adapter(load("llama"), adapter)
    layers = model.layers
    assert layers[1].mlp.up_proj.lora_config.scaling == 8 / 2
    assert layers[0].mlp.up_proj.lora_config.scaling == 8 / 4
    assert layers[0].self_attn.k_proj.lora_config.scaling == 3 / 4
    qjax.hf.save_adapter(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["rank_pattern"] == {"model.layers.1.mlp.up_proj": 2}
    assert set(written["alpha_pattern"]) == {f"model.layers.{i}.self_attn.k_proj" for i in (0, 1)}
    again = qjax.hf.load_adapter(load("llama"), tmp_path / "out")
    assert again.layers[1].mlp.up_proj.lora_config == layers[1].mlp.up_proj.lora_config
    with pytest.raises(ValueError, match=r"different rank or alpha; load .* scan_layers=False"):
        qjax.hf.load_adapter(load("llama", scan_layers=True), adapter)


def test_a_new_adapter_of_ours_is_read_back(tmp_path):
    model = load("llama")
    add_lora(model, LoraConfig(rank=3, include="layers/1/.*(up|q)_proj"), rngs=nnx.Rngs(0))
    layer = model.layers[1].mlp.up_proj
    layer.lora_b.set_value(jnp.ones_like(layer.lora_b[...]))
    qjax.hf.save_adapter(model, tmp_path, base_model="me/tiny")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    names = ["model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    assert written["target_modules"] == names and written["base_model_name_or_path"] == "me/tiny"
    again = qjax.hf.load_adapter(load("llama"), tmp_path)
    one, other = (nnx.to_flat_state(nnx.state(m, nnx.LoRAParam)) for m in (model, again))
    assert [path for path, _ in one] == [path for path, _ in other] and len(one) == 4
    for (_, a), (_, b) in zip(one, other, strict=True):
        np.testing.assert_array_equal(a[...], b[...])


def test_an_adapter_of_bert_names_no_task(tmp_path):
    # PEFT wraps any model for None; for "CAUSAL_LM" it asks for what BERT has not.
    model = add_lora(load("bert"), LoraConfig(rank=2, include="up_proj"), rngs=nnx.Rngs(0))
    qjax.hf.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] is None


NAME = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"


@pytest.mark.parametrize(
    "changes, kind, message",
    [
        ({"use_dora": True}, ValueError, "'model.layers.0.mlp.down_proj' has no lora_magnitude_v"),
        ({"peft_type": "IA3"}, NotImplementedError, "peft_type='IA3': only 'LORA'"),
        ({"bias": "all"}, NotImplementedError, "bias='all': not implemented"),
        ({"lora_bias": True}, NotImplementedError, "lora_bias=True: not implemented"),
        ({"trainable_token_indices": [3]}, NotImplementedError, r"trainable_token_indices=\[3\]"),
        ({"layer_replication": [[0, 1]]}, NotImplementedError, r"layer_replication=\[\[0, 1\]\]"),
        ({"init_lora_weights": "pissa"}, NotImplementedError, "'pissa': PEFT computes"),
        ({"modules_to_save": ["lm_head"]}, ValueError, "no tensors of modules_to_save='lm_head'"),
        ({"target_modules": ["w1"]}, ValueError, "'model.layers.0.mlp.down_proj', which is not in"),
        ({"target_modules": "("}, ValueError, r"target_modules='\(': missing \)"),
        ({"layers_to_transform": [1]}, ValueError, "tensors of 'model.layers.0.mlp.down_proj'"),
        ({"exclude_modules": ["k_proj"]}, ValueError, "tensors of 'model.layers.0.self_attn.k"),
        (
            {"modules_to_save": "lm_head"},
            ValueError,
            "modules_to_save='lm_head' has the wrong type",
        ),
        ({"rank_pattern": []}, ValueError, r"rank_pattern=\[\] has the wrong type"),
        ({"r": "4"}, ValueError, "adapter_config.json: rank must be a positive integer"),
        ({"lora_dropout": 2}, ValueError, "adapter_config.json: dropout must be in"),
        ({"r": 8}, ValueError, r"has \{'A': \[4, 64\], .* must be A \[8, in\] and B \[out, 8\]"),
    ],
)
def test_another_kind_of_adapter_is_named(adapter, changes, kind, message):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(kind, match=message):
        qjax.hf.load_adapter(load("llama"), adapter)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(NAME.format("B")), "must be A .4, in. and B"),
        (lambda t: t.clear(), "holds no adapter"),
        (lambda t: t.update(other=np.zeros((2, 2), np.float32)), "'other' .* is no LoRA matrix"),
        (
            lambda t: t.update({NAME.format("A"): np.zeros((4, 32), np.float32)}),
            r"'layers/0/mlp/up_proj' is for a layer of \[32, 64\], this model's is \[64, 64\]",
        ),
        (
            lambda t: [t.pop(n) for n in [*t] if "k_proj" in n],
            "no tensors of 'model.layers.0.self_attn.k_proj', which its config names",
        ),
        (
            lambda t: t.update({n.replace("mlp", "moe"): t.pop(n) for n in [*t] if "mlp" in n}),
            r"module 'model.layers.0.moe.\w+' is no dense layer of this model; it has",
        ),
    ],
)
def test_an_adapter_of_another_base_is_named_and_nothing_is_loaded(adapter, change, message):
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    model = load("llama")
    with pytest.raises(ValueError, match=message):
        qjax.hf.load_adapter(model, adapter)
    assert not jax.tree.leaves(nnx.state(model, nnx.LoRAParam))


def test_misuse_is_named(adapter, tmp_path):
    model = load("llama")
    with pytest.raises(ValueError, match="the model has no adapter"):
        qjax.hf.save_adapter(model, tmp_path)
    qjax.hf.load_adapter(model, adapter)
    with pytest.raises(ValueError, match="an adapter 'default' already: merge_lora ends it"):
        qjax.hf.load_adapter(model, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors"):
        qjax.hf.load_adapter(load("llama"), adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"12345678{")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        qjax.hf.load_adapter(load("llama"), adapter)


def test_target_modules_that_match_nothing(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    head = {"base_model.model.lm_head.weight": np.zeros((128, 64), np.float32)}
    save_file(head, adapter / "adapter_model.safetensors")
    for modules in (["query"], "blocks.*"):
        config |= {"target_modules": modules, "modules_to_save": ["lm_head"]}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="matches no module of this model; it has"):
            qjax.hf.load_adapter(load("llama"), adapter)


def test_several_adapters_on_one_model():
    """Each gives its own logits, and the base its own: nothing of one is left in another."""
    model, ref = load("llama"), reference("llama")
    for name in ("dora", "lora"):
        qjax.load_adapter(model, FOLDER / "llama" / f"adapter_{name}", name=name)
    ids = ref["input_ids"]
    for name, logits in (("lora", "logits_lora"), ("dora", "logits_dora"), (None, "logits")):
        qjax.set_adapter(model, name)
        assert error(forward(model, ids, np.ones_like(ids)), ref[logits]).max() < TOLERANCE


@pytest.mark.parametrize("family, name", [("llama", "dora"), ("mixtral", "lora_experts")])
def test_merged_weights_give_the_logits_of_peft(family, name):
    model = qjax.load_adapter(load(family), FOLDER / family / f"adapter_{name}")
    merged = qjax.merge_lora(model, jnp.float32)
    ids = reference(family)["input_ids"]
    logits = forward(merged, ids, np.ones_like(ids))
    assert error(logits, reference(family)[f"logits_{name}"]).max() < TOLERANCE


def test_replaced_modules_are_exported_and_named(tmp_path):
    """The adapter's lm_head goes into a float export, the base's into a 4-bit one."""
    folder = FOLDER / "llama" / "adapter_patterns"
    model = qjax.load_adapter(load("llama", config=qjax.QuantConfig()), folder)
    head = load_file(folder / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    base = load_file(FOLDER / "llama" / "hf" / "model.safetensors")["lm_head.weight"]
    for layout, expected in (("float", head), ("bitsandbytes", base)):
        model.save_pretrained(tmp_path / layout, layout=layout)
        written = load_file(tmp_path / layout / "model.safetensors")["lm_head.weight"]
        np.testing.assert_array_equal(written, expected)
    packed = load("llama", config=qjax.QuantConfig(include="lm_head|_proj"))
    with pytest.raises(ValueError, match=r"replaces 'lm_head.weight', which is in 4 bits"):
        qjax.load_adapter(packed, folder)


def test_experts_whose_a_differs_are_written_with_twice_the_rank(tmp_path):
    """add_lora gives gate and up projection an A each; PEFT has one for both."""
    model = load("mixtral")
    add_lora(model, LoraConfig(rank=2, include="experts"), rngs=nnx.Rngs(0))
    for layer in (model.layers[0], model.layers[1]):
        for part in ("gate_proj", "up_proj", "down_proj"):
            adapted = getattr(layer.mlp.experts, part)
            adapted.lora_b[...] = jax.random.normal(jax.random.key(1), adapted.lora_b.shape)
    qjax.save_adapter(model, tmp_path)
    again = qjax.load_adapter(load("mixtral"), tmp_path)
    for i in (0, 1):
        for part in ("gate_proj", "up_proj", "down_proj"):
            one, other = (getattr(m.layers[i].mlp.experts, part) for m in (model, again))
            assert other.lora_a.shape[-1] == (2 if part == "down_proj" else 4)
            # The same products with zeros among them, of size 1, in float32 sums of another order.
            merged = one.float_weight(), other.float_weight()
            np.testing.assert_allclose(*merged, rtol=1e-6, atol=1e-6)


def test_experts_of_which_one_projection_is_adapted(tmp_path):
    """PEFT's parameter holds gate and up; the columns of up are zero."""
    model = load("mixtral")
    add_lora(model, LoraConfig(rank=2, include="experts/gate"), rngs=nnx.Rngs(0))
    qjax.save_adapter(model, tmp_path)
    again = qjax.load_adapter(load("mixtral"), tmp_path)
    gate, up = (getattr(again.layers[1].mlp.experts, part) for part in ("gate_proj", "up_proj"))
    np.testing.assert_array_equal(
        gate.lora_a[...], model.layers[1].mlp.experts.gate_proj.lora_a[...]
    )
    assert up.lora_a is gate.lora_a and not up.lora_b[...].any()
