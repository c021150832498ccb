"""Several adapters on one NNX model: by name, one or none active, and arrays that they replace."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax

CFG = qjax.QuantConfig(block_size=32, compute_dtype=jnp.float32, exclude="head")


class Model(nnx.Module):
    """Two dense layers, a norm between them, a head."""

    def __init__(self, rngs):
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.head = nnx.Linear(64, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.up(x)))


def fill(model, seed):
    """Make the active adapter do something."""
    for path, value in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        key = jax.random.fold_in(jax.random.key(seed), len(path))
        value.set_value(value[...] + 0.1 * jax.random.normal(key, value.shape))


@pytest.fixture
def made():
    """A model with two adapters, and its outputs with none and with each."""
    model, x = qjax.quantize_model(Model(nnx.Rngs(0)), CFG), jnp.ones((2, 32))
    outputs = {None: model(x)}
    first = qjax.LoraConfig(4, dora=True, modules_to_save=("norm", "^head$"))
    qjax.add_lora(model, first, rngs=nnx.Rngs(1), name="one")
    # DoRA divides by a length and multiplies by it: float32 roundings.
    np.testing.assert_allclose(model(x), outputs[None], rtol=1e-5, atol=1e-6)
    fill(model, 0)
    outputs["one"] = model(x)
    qjax.add_lora(model, qjax.LoraConfig(2, dropout=0.5), rngs=nnx.Rngs(2), name="two")
    fill(model, 1)
    model.eval()
    outputs["two"] = model(x)
    return model, x, outputs


def trained(model):
    return {"/".join(map(str, p)) for p, _ in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))}


def test_the_active_one_alone_acts_and_is_trained(made):
    model, x, outputs = made
    assert qjax.adapter_names(model) == ("one", "two") and qjax.active_adapter(model) == "two"
    for name in ("one", None, "two", "one"):
        qjax.set_adapter(model, name)
        assert qjax.active_adapter(model) == name
        np.testing.assert_array_equal(model(x), outputs[name])
        base = {f"up/lora_{part}" for part in ("a", "b")}
        saved = {"norm/scale", "norm/bias", "head/kernel", "head/bias"}
        expected = {None: set(), "two": base, "one": base | {"up/lora_magnitude"} | saved}
        assert trained(model) == expected[name]
    with qjax.disable_adapter(model):
        np.testing.assert_array_equal(model(x), outputs[None])
    np.testing.assert_array_equal(model(x), outputs["one"])


def test_deleting_leaves_the_others_and_the_base(made):
    model, x, outputs = made
    qjax.delete_adapter(model, "two")
    np.testing.assert_array_equal(model(x), outputs[None])
    qjax.set_adapter(model, "one")
    np.testing.assert_array_equal(model(x), outputs["one"])
    qjax.delete_adapter(model, "one")
    np.testing.assert_array_equal(model(x), outputs[None])
    fresh = qjax.quantize_model(Model(nnx.Rngs(0)), CFG)
    paths = lambda m: {p for p, _ in nnx.to_flat_state(nnx.state(m))}  # noqa: E731
    assert paths(model) == paths(fresh)


def test_merging_takes_the_active_one_and_drops_the_rest(made):
    model, x, outputs = made
    qjax.set_adapter(model, "one")
    merged = qjax.merge_lora(model, jnp.float32)
    assert qjax.adapter_names(merged) == () and type(merged.up) is nnx.Linear
    assert not trained(merged)
    # The same sums of 64 float32 terms in another order.
    np.testing.assert_allclose(merged(x), outputs["one"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(model(x), outputs["one"])


def test_all_are_saved_and_loaded(made, tmp_path):
    model, x, outputs = made
    qjax.save(tmp_path / "model", model)
    blank = qjax.add_lora(
        qjax.add_lora(
            qjax.quantize_model(Model(nnx.Rngs(5)), CFG),
            qjax.LoraConfig(4, dora=True, modules_to_save=("norm", "^head$")),
            rngs=nnx.Rngs(6),
            name="one",
        ),
        qjax.LoraConfig(2, dropout=0.5),
        rngs=nnx.Rngs(7),
        name="two",
    )
    again = qjax.load(tmp_path / "model", like=blank)
    again.eval()
    np.testing.assert_array_equal(again(x), outputs["two"])
    np.testing.assert_array_equal(qjax.set_adapter(again, "one")(x), outputs["one"])
    np.testing.assert_array_equal(qjax.set_adapter(again, None)(x), outputs[None])
    # The adapters alone, put aside or not, on a base that is there: that of `made`, not of `blank`.
    qjax.save(tmp_path / "adapters", model, only="adapters")
    for name in ("two", "one"):
        qjax.set_adapter(model, name)
        for _, value in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
            value.set_value(jnp.zeros_like(value[...]))
    qjax.set_adapter(model, "two")
    restored = qjax.load(tmp_path / "adapters", like=model)
    np.testing.assert_array_equal(restored(x), outputs["two"])
    np.testing.assert_array_equal(qjax.set_adapter(restored, "one")(x), outputs["one"])


def test_a_switch_works_inside_jit(made):
    model, x, outputs = made

    @nnx.jit
    def both(model, x):
        with qjax.disable_adapter(model):
            reference = model(x)
        return model(x), reference

    adapted, reference = both(model, x)
    # Sums of 64 float32 products, which jit may order otherwise.
    np.testing.assert_allclose(adapted, outputs["two"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(reference, outputs[None], rtol=1e-5, atol=1e-6)


def test_requantizing_reports_what_it_costs(made):
    model, x, outputs = made
    qjax.set_adapter(model, "one")
    merged, errors = qjax.merge_lora(model, requantize=True)
    assert list(errors) == ["up/kernel"] and merged.up.kernel.q.double_quant
    exact = np.asarray(model.up.float_weight(jnp.float32), np.float64)
    old = np.asarray(model.up.kernel.q.dequantize(jnp.float32), np.float64)
    new = np.asarray(merged.up.kernel.q.dequantize(jnp.float32), np.float64)
    error, norm = np.linalg.norm(new - exact), np.linalg.norm
    # float32 norms of 2048 terms
    np.testing.assert_allclose(errors["up/kernel"].weight, error / norm(exact), rtol=1e-4)
    np.testing.assert_allclose(errors["up/kernel"].update, error / norm(exact - old), rtol=1e-4)
    assert 0 < np.abs(merged(x) - outputs["one"]).max() < np.abs(outputs["one"]).max()
    params = {"up": {"kernel": jnp.asarray(exact, jnp.float32)}}
    tree = qjax.quantize_params(params, dataclasses.replace(CFG, exclude=None))
    tree = qjax.add_lora_params(tree, qjax.LoraConfig(4), jax.random.key(0))
    tree, errors = qjax.merge_lora(tree, requantize=True)
    assert list(errors) == ["up/kernel"] and tree["up"]["kernel"].adapter is None
    for x in (merged, tree):
        with pytest.raises(ValueError, match=r"no adapter to merge|no kernel has an adapter"):
            qjax.merge_lora(x, requantize=True)


def test_misuse_is_named(made):
    model, _, _ = made
    with pytest.raises(
        ValueError, match=r"name='three': the model's adapters are \['one', 'two'\]"
    ):
        qjax.set_adapter(model, "three")
    with pytest.raises(ValueError, match="has an adapter 'one' already"):
        qjax.add_lora(model, qjax.LoraConfig(2), rngs=nnx.Rngs(0), name="one")
    with pytest.raises(ValueError, match=r"up has an adapter already; .* name= adds one"):
        qjax.add_lora(model, qjax.LoraConfig(2), rngs=nnx.Rngs(0), name="two")
    with pytest.raises(ValueError, match=r"name='a/b' of an adapter must be letters"):
        qjax.add_lora(model, qjax.LoraConfig(2), rngs=nnx.Rngs(0), name="a/b")
    for pattern, message in (
        ("^up$", "up is in 4 bits; exclude it"),
        ("tail", "matches no module"),
    ):
        cfg = qjax.LoraConfig(2, modules_to_save=pattern)
        with pytest.raises(ValueError, match=message):
            qjax.add_lora(model, cfg, rngs=nnx.Rngs(0), name="new")
    assert qjax.adapter_names(model) == ("one", "two") and qjax.active_adapter(model) == "two"
