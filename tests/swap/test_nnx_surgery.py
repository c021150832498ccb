"""NNX surgery on models that know nothing of qjax."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.nnx import QuantLinear
from tests.swap.nnx_models import F32, IDS, QUANTIZED, Model, decoded, modules, quantized


def test_defaults(mode):
    model = Model(nnx.Rngs(0))
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert qjax.quantize_model(model, F32) is model
    assert quantized(model) == QUANTIZED
    assert {path for path, _ in nnx.to_flat_state(nnx.state(model))} == paths
    assert type(model.embed) is nnx.Embed
    assert type(model.lm_head) is nnx.Linear
    assert model.blocks[0].attn.out.kernel.q.contract_axes == (0, 1)
    # The same sums in float32, in another order.
    want = decoded(model, Model(nnx.Rngs(0)))(IDS)
    np.testing.assert_allclose(model(IDS), want, rtol=1e-4, atol=1e-4)
    graphdef, state = nnx.split(model)
    jitted = jax.jit(lambda state: nnx.merge(graphdef, state)(IDS))(state)
    np.testing.assert_allclose(jitted, want, rtol=1e-4, atol=1e-4)


def test_include_exclude_and_overrides():
    cfg = qjax.QuantConfig(
        include=["mlp", "embed", "lm_head"],
        exclude=r"blocks/1",
        overrides={"layers/2": {"format": "fp4", "block_size": 32}},
        compute_dtype=jnp.float32,
    )
    model = qjax.quantize_model(Model(nnx.Rngs(0)), cfg)
    assert quantized(model) == {
        "blocks/0/mlp/layers/0",
        "blocks/0/mlp/layers/2",
        "embed",
        "lm_head",
    }
    first, second = model.blocks[0].mlp.layers[0], model.blocks[0].mlp.layers[2]
    assert (first.kernel.q.format, first.kernel.q.block_size) == ("nf4", 64)
    assert (second.kernel.q.format, second.kernel.q.block_size) == ("fp4", 32)
    want = decoded(model, Model(nnx.Rngs(0)))(IDS)
    # As above.
    np.testing.assert_allclose(model(IDS), want, rtol=1e-4, atol=1e-4)


def test_shared_layers_stay_shared():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(64, 64, rngs=rngs)
            self.again = self.first
            self.inside = nnx.data((self.first, nnx.Linear(64, 64, rngs=rngs)))

    model = qjax.quantize_model(Twice(nnx.Rngs(0)), F32)
    assert model.again is model.first
    assert model.inside[0] is model.first
    assert type(model.first) is type(model.inside[1]) is QuantLinear
    copy = qjax.dequantize_model(model)
    assert copy.again is copy.first is copy.inside[0]
    assert type(copy.first) is nnx.Linear
    assert type(model.first) is QuantLinear


def test_shared_arrays_stay_shared():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 64, rngs=rngs)
            self.b.kernel = self.a.kernel

    model = qjax.quantize_model(Tied(nnx.Rngs(0)), F32)
    assert model.a.kernel is model.b.kernel
    copy = qjax.dequantize_model(model)
    assert copy.a.kernel is copy.b.kernel
    kept = qjax.quantize_model(Tied(nnx.Rngs(0)), qjax.QuantConfig(exclude="^b/"))
    assert type(kept.a) is type(kept.b) is nnx.Linear
    assert kept.a.kernel is kept.b.kernel


def test_floats_are_freed_layer_by_layer(monkeypatch):
    """When a layer is being quantized, the float weights of all earlier ones are gone."""
    import qjax.swap.nnx as surgery

    gc.collect()
    gc.freeze()  # objects of earlier tests: to look at them at each layer takes seconds
    model = Model(nnx.Rngs(0))
    references = {
        path: weakref.ref(modules(model)[path].kernel.get_raw_value()) for path in QUANTIZED
    }
    alive = []
    quantize_weight = surgery.quantize_weight

    def watched(*args, **kwargs):
        gc.collect()
        alive.append(sum(ref() is not None for ref in references.values()))
        return quantize_weight(*args, **kwargs)

    monkeypatch.setattr(surgery, "quantize_weight", watched)
    qjax.quantize_model(model, F32)
    assert alive == list(range(len(QUANTIZED), 0, -1))
    gc.collect()
    assert all(ref() is None for ref in references.values())


def test_root_may_be_a_layer():
    layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    assert qjax.quantize_model(layer) is layer
    assert type(layer) is QuantLinear
    assert type(qjax.dequantize_model(layer)) is nnx.Linear


def test_abstract_model():
    """What a checkpoint is restored into: made without one float array."""
    model = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    model = qjax.add_lora(qjax.quantize_model(model, F32), qjax.LoraConfig(4), rngs=nnx.Rngs(0))
    traced = nnx.eval_shape(
        lambda: qjax.add_lora(
            qjax.quantize_model(Model(nnx.Rngs(0)), F32), qjax.LoraConfig(4), rngs=nnx.Rngs(0)
        )
    )
    real = qjax.add_lora(
        qjax.quantize_model(Model(nnx.Rngs(0)), F32), qjax.LoraConfig(4), rngs=nnx.Rngs(0)
    )
    shapes = lambda m: jax.tree.map(lambda x: (x.shape, x.dtype), nnx.state(m))  # noqa: E731
    assert shapes(model) == shapes(traced) == shapes(real)
    assert isinstance(model.by_name["out"].kernel.q.packed, jax.ShapeDtypeStruct)


class TestBadInput:
    def test_not_a_module(self):
        with pytest.raises(TypeError, match=r"must be an nnx.Module, got dict; .*quantize_params"):
            qjax.quantize_model({"kernel": jnp.ones((64, 8))})

    def test_no_dense_layer(self):
        with pytest.raises(ValueError, match="LayerNorm has no dense layer to quantize"):
            qjax.quantize_model(nnx.LayerNorm(8, rngs=nnx.Rngs(0)))

    def test_include_that_matches_nothing(self):
        message = (
            "include='q_proj' matches no weight of a dense layer; there are: .*attn/key/kernel"
        )
        with pytest.raises(ValueError, match=message):
            qjax.quantize_model(Model(nnx.Rngs(0)), qjax.QuantConfig(include="q_proj"))

    @pytest.mark.parametrize(
        "fields, name",
        [
            ({"exclude": "q_proj"}, "exclude='q_proj'"),
            ({"overrides": {"q_proj": {"format": "fp4"}}}, r"overrides\['q_proj'\]"),
        ],
    )
    def test_other_patterns_that_match_nothing(self, fields, name):
        message = f"{name} matches no weight of a dense layer and changes nothing; there are: .*key"
        with pytest.warns(UserWarning, match=message):
            model = qjax.quantize_model(Model(nnx.Rngs(0)), qjax.QuantConfig(**fields))
        assert quantized(model) == QUANTIZED

    def test_no_config(self):
        with pytest.raises(TypeError, match="cfg must be a QuantConfig, got 'nf4'"):
            qjax.quantize_model(Model(nnx.Rngs(0)), "nf4")

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_not_finite(self, value):
        model = Model(nnx.Rngs(0))
        kernel = model.blocks[1].attn.out.kernel
        kernel[...] = kernel[...].at[0, 1, 2].set(value)
        with pytest.raises(ValueError, match="blocks/1/attn/out/kernel holds NaN or inf"):
            qjax.quantize_model(model)

    @pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
    def test_not_floating(self, dtype):
        model = nnx.Sequential(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
        model.layers[0].kernel = nnx.Param(jnp.ones((64, 8), dtype))
        message = f"layers/0/kernel must be a floating array, got {jnp.dtype(dtype).name}"
        with pytest.raises(TypeError, match=message):
            qjax.quantize_model(model)
