"""Adapters of PEFT: logits and gradients as there, files written as there."""

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
    ("llama", "rslora"),
    ("gpt2", "lora"),
    pytest.param("llama", "lora", marks=slow),
    pytest.param("qwen2", "lora", marks=slow),
    pytest.param("mixtral", "lora", marks=slow),
]


def load(family, **options):
    return qjax.hf.from_pretrained(FOLDER / family / "hf", **options)


@pytest.fixture
def adapter(tmp_path):
    """A writable copy of a golden adapter of the Llama."""
    return shutil.copytree(FOLDER / "llama" / "adapter_lora", tmp_path / "adapter")


@pytest.mark.parametrize("family, name", ADAPTERS)
def test_logits_on_a_float_base_equal_peft(family, name):
    model = qjax.hf.load_adapter(load(family), FOLDER / family / f"adapter_{name}")
    ids = reference(family)["input_ids"]
    logits = forward(model, ids, np.ones_like(ids))
    assert error(logits, reference(family)[f"logits_{name}"]).max() < TOLERANCE


@pytest.mark.parametrize("family, name", ADAPTERS)
def test_logits_on_a_4bit_base_equal_peft(family, name, tmp_path):
    model = qjax.hf.from_pretrained(write_bnb(family, tmp_path))
    qjax.hf.load_adapter(model, FOLDER / family / f"adapter_{name}")
    ids = reference(family)["input_ids"]
    logits = forward(model, ids, np.ones_like(ids))
    assert error(logits, reference(family)[f"logits_nf4_{name}"]).max() < TOLERANCE


@pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("family, name", [("llama", "lora"), ("llama", "rslora"), ("gpt2", "lora")])
def test_an_adapter_is_written_as_it_was_read(family, name, scan_layers, tmp_path):
    theirs = FOLDER / family / f"adapter_{name}"
    model = qjax.hf.load_adapter(load(family, scan_layers=scan_layers), theirs)
    qjax.hf.save_adapter(model, tmp_path)
    ours = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert ours == (theirs / "adapter_model.safetensors").read_bytes()
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = json.loads((theirs / "adapter_config.json").read_text())
    assert sorted(expected.pop("target_modules")) == written.pop("target_modules")
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


def test_the_gradient_is_of_the_adapter_alone(tmp_path):
    model = qjax.hf.from_pretrained(write_bnb("gpt2", tmp_path))
    qjax.hf.load_adapter(model, FOLDER / "gpt2" / "adapter_lora")
    ids = reference("gpt2")["input_ids"]
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    def loss(adapters):
        logits = nnx.merge(graphdef, adapters, rest)(ids)[:, :-1]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1)
        return -picked.mean()

    grads = jax.tree.leaves(jax.jit(jax.grad(loss))(adapters))
    # Against a finite difference along the gradient: central, so the error is of second order,
    # and a step of 1e-2 keeps it and the float32 rounding of the loss (1e-6 / 1e-2) below 1 %.
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in grads))
    tree = jax.tree.unflatten(jax.tree.structure(adapters), grads)
    ahead, behind = (
        loss(jax.tree.map(lambda p, g, s=s: p + s * 1e-2 * g / norm, adapters, tree))
        for s in (1, -1)
    )
    np.testing.assert_allclose((ahead - behind) / 2e-2, norm, rtol=1e-2)


NAME = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"


@pytest.mark.parametrize(
    "changes, kind, message",
    [
        ({"use_dora": True}, NotImplementedError, "use_dora=True is not implemented"),
        ({"peft_type": "IA3"}, NotImplementedError, "peft_type='IA3'; only 'LORA'"),
        ({"bias": "all"}, NotImplementedError, "bias='all' is not implemented"),
        ({"modules_to_save": ["lm_head"]}, NotImplementedError, r"modules_to_save=\['lm_head'\]"),
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
    with pytest.raises(ValueError, match="has an adapter already; merge_lora ends it"):
        qjax.hf.load_adapter(model, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors"):
        qjax.hf.load_adapter(load("llama"), adapter)
