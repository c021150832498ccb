"""Adapters from float weights (LoftQ, PiSSA), per-layer ranks, for NNX models and Linen trees."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from tests.models.golden import FOLDER, error, reference

CFG = qjax.QuantConfig(block_size=32, compute_dtype=jnp.float32)
INITS = [{"init": "pissa"}, {"init": "loftq"}, {"init": "loftq", "loftq_iterations": 1}]


class Pair(nnx.Module):
    """Two layers of other axes."""

    def __init__(self, rngs):
        self.up = nnx.Linear(32, 48, rngs=rngs)
        self.out = nnx.LinearGeneral((4, 12), 32, axis=(-2, -1), rngs=rngs)


def params_of(model):
    return {
        "up": {"kernel": model.up.kernel[...], "bias": jnp.zeros(48)},
        "out": {"kernel": model.out.kernel[...], "bias": jnp.zeros(32)},
    }


def lost(weight, exact):
    return float(np.linalg.norm(np.asarray(weight, np.float64) - np.asarray(exact, np.float64)))


@pytest.mark.parametrize("fields", INITS, ids=["pissa", "loftq", "loftq1"])
def test_both_kinds_come_nearer_to_the_source(fields, key):
    source = Pair(nnx.Rngs(0))
    cfg = qjax.LoraConfig(rank=8, alpha=4, **fields)
    packed = qjax.quantize_model(nnx.clone(source), CFG)
    plain = {
        n: lost(getattr(packed, n).kernel[...], getattr(source, n).kernel[...])
        for n in ("up", "out")
    }
    codes = np.asarray(packed.up.kernel.q.packed)
    model = qjax.add_lora(packed, cfg, rngs=nnx.Rngs(1), source=source)
    tree = qjax.quantize_params(
        params_of(source), CFG, contract_axes={"up/k": (0,), "out/k": (0, 1)}, batch_ndim=0
    )
    tree = qjax.add_lora_params(tree, cfg, key, source=params_of(source))
    for name, before in plain.items():
        exact = getattr(source, name).kernel[...]
        # Eight of 32 directions of noise hold more than a third of its square.
        assert lost(getattr(model, name).float_weight(), exact) < 0.85 * before
        assert lost(tree[name]["kernel"].unbox(), exact) < 0.85 * before
    assert np.array_equal(codes, model.up.kernel.q.packed) == (not cfg.changes_base)


def test_a_function_gives_the_weights_one_at_a_time():
    source, asked = Pair(nnx.Rngs(0)), []

    def read(path):
        asked.append(path)
        return getattr(source, path.split("/")[0]).kernel[...]

    model = qjax.quantize_model(nnx.clone(source), CFG)
    qjax.add_lora(model, qjax.LoraConfig(4, init="loftq"), rngs=nnx.Rngs(0), source=read)
    assert sorted(asked) == ["out/kernel", "up/kernel"]


def test_weights_of_a_folder(tmp_path):
    """LoftQ on the golden Llama brings its logits nearer to the float model's."""
    folder, ids = FOLDER / "llama" / "hf", reference("llama")["input_ids"]
    model = qjax.from_pretrained(folder, config=CFG)
    before = error(model(ids), reference("llama")["logits"]).mean()
    source = qjax.float_weights(folder, model)
    np.testing.assert_array_equal(
        source("lm_head/kernel"), qjax.from_pretrained(folder).lm_head.kernel[...]
    )
    model = qjax.add_lora(model, qjax.LoraConfig(16, init="loftq"), rngs=nnx.Rngs(0), source=source)
    assert error(model(ids), reference("llama")["logits"]).mean() < 0.75 * before
    with pytest.raises(ValueError, match=r"has changed the base weight .* name it by base_model="):
        qjax.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="the model has no weight 'lm_head/bias'"):
        source("lm_head/bias")


def test_ranks_by_layer(key):
    cfg = qjax.LoraConfig(8, 16, overrides={"up": {"rank": 2}, "out": {"alpha": 4}})
    model = qjax.add_lora(qjax.quantize_model(Pair(nnx.Rngs(0)), CFG), cfg, rngs=nnx.Rngs(1))
    assert (model.up.lora_a.shape[-1], model.up.lora_config.scaling) == (2, 8)
    assert (model.out.lora_a.shape[-1], model.out.lora_config.scaling) == (8, 0.5)
    dense = {"kernel": jnp.ones((32, 48)), "bias": jnp.ones(48)}
    tree = qjax.quantize_params({"up": dense, "out": dense}, CFG)
    box = qjax.add_lora_params(tree, cfg, key)["up"]["kernel"]
    assert (box.lora_a.shape[-1], box.scaling) == (2, 8)


def test_misuse_is_named(key):
    model, rngs = qjax.quantize_model(Pair(nnx.Rngs(0)), CFG), nnx.Rngs(0)
    loftq = qjax.LoraConfig(4, init="loftq")
    tree = qjax.quantize_params({"up": {"kernel": jnp.ones((32, 48)), "bias": jnp.ones(48)}}, CFG)
    for source, message in (
        (None, "init='loftq' needs the float weights: source= takes a float model"),
        (model, "source has no float weight"),
        (lambda path: jnp.ones((2, 2)), r"source: out/kernel must be \[4, 12, 32\], got \[2, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            qjax.add_lora(model, loftq, rngs=rngs, source=source)
    for source, message in (
        (None, "init='loftq' needs the float weights"),
        ({"down": 1}, "source has no float kernel up/kernel"),
        ({"up": {"kernel": jnp.ones((2, 2))}}, r"source: up/kernel must be \[32, 48\]"),
    ):
        with pytest.raises(ValueError, match=message):
            qjax.add_lora_params(tree, loftq, key, source=source)
    with pytest.raises(ValueError, match="init='kaiming' reads no weights: leave source= out"):
        qjax.add_lora(model, qjax.LoraConfig(4), rngs=rngs, source=Pair(nnx.Rngs(0)))
    with pytest.raises(NotImplementedError, match="modules_to_save for a Linen tree"):
        qjax.add_lora_params(tree, qjax.LoraConfig(4, modules_to_save="up"), key)
    for fields, message in (
        ({"overrides": {"up": {"init": "pissa"}}}, r"overrides\['up'\] has unknown fields"),
        ({"overrides": {"up": {"rank": 0}}}, r"overrides\['up'\]: rank must be a positive"),
        ({"loftq_iterations": 0}, "loftq_iterations must be positive, got 0"),
        ({"init": "svd"}, "init must be one of .*'pissa', 'loftq'.*, got 'svd'"),
    ):
        with pytest.raises(ValueError, match=message):
            qjax.LoraConfig(**fields)
