"""NNX surgery on models that know nothing of qjax."""

import gc
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.nnx import (
    LoraLinear,
    QuantConv,
    QuantEinsum,
    QuantEmbed,
    QuantLinear,
    QuantLinearGeneral,
    QuantParam,
)

F32 = qjax.QuantConfig(block_size=32, compute_dtype=jnp.float32)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(2, 64, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(64, 96, rngs=rngs), nnx.gelu, nnx.Linear(96, 64, rngs=rngs)
        )
        self.mix = nnx.Einsum("btd,de->bte", (64, 64), (64,), rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm(x))
        return self.mix(x + self.mlp(x))


class Model(nnx.Module):
    def __init__(self, rngs, blocks=2):
        self.embed = nnx.Embed(50, 64, rngs=rngs)
        self.blocks = nnx.List(Block(rngs) for _ in range(blocks))
        self.by_name = nnx.Dict(out=nnx.Linear(64, 64, rngs=rngs))
        self.lm_head = nnx.Linear(64, 50, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.by_name["out"](x))


IDS = np.arange(6).reshape(2, 3)
QUANTIZED = {
    f"blocks/{i}/attn/{name}" for i in range(2) for name in ("query", "key", "value", "out")
}
QUANTIZED |= {f"blocks/{i}/{name}" for i in range(2) for name in ("mlp/layers/0", "mlp/layers/2")}
QUANTIZED |= {"blocks/0/mix", "blocks/1/mix", "by_name/out"}


def modules(model):
    return {"/".join(map(str, path)): m for path, m in nnx.iter_modules(model, graph=True)}


def quantized(model):
    kinds = (QuantLinear, QuantLinearGeneral, QuantEinsum, QuantEmbed)
    return {path for path, m in modules(model).items() if type(m) in kinds}


def decoded(model, plain):
    """The float model `plain`, with the weights of `model` decoded by hand."""
    for path, layer in modules(model).items():
        name = "embedding" if isinstance(layer, nnx.Embed) else "kernel"
        if path in quantized(model):
            modules(plain)[path].__dict__[name][...] = getattr(layer, name).q.dequantize()
    return plain


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


@pytest.fixture
def quick_collection():
    """Objects of earlier tests are passed over: a collection of them all takes seconds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_floats_are_freed_layer_by_layer(monkeypatch, quick_collection):
    """When a layer is being quantized, the float weights of all earlier ones are gone."""
    import qjax.swap.nnx as surgery

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


class Stack(nnx.Module):
    """Two blocks made by nnx.vmap, run by nnx.scan."""

    def __init__(self, rngs, heads=False):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def make(rngs):
            return nnx.Sequential(
                nnx.Linear(32, 64, rngs=rngs),
                nnx.relu,
                nnx.LinearGeneral((64,), (2, 16), rngs=rngs),
            )

        self.layers = make(rngs)

    def __call__(self, x):
        def step(layer, x):
            return layer(x).reshape(x.shape)

        return nnx.scan(nnx.remat(step), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)


class Named(nnx.Module):
    """Two layers stacked and scanned as an `nnx.StateAxes` says."""

    def __init__(self, axis, axes):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=nnx.StateAxes({nnx.Param: axis, ...: 0}))
        def make(rngs):
            return nnx.Linear(32, 32, rngs=rngs)

        self.layers, self.axes = make(nnx.Rngs(0)), axes

    def __call__(self, x):
        def step(layer, x):
            return layer(x)

        return nnx.scan(step, in_axes=(self.axes, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)


def test_stacks_whose_axes_are_named_by_type():
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    both = nnx.StateAxes({(nnx.Param, QuantParam): 0, ...: None})
    model = qjax.quantize_model(Named(0, both), F32)
    model = qjax.add_lora(model, qjax.LoraConfig(rank=2), rngs=nnx.Rngs(1))
    decoded = np.float64(model.layers.kernel.q.dequantize())
    # float32 sums of 32 products, of numbers around 1.
    np.testing.assert_allclose(model(x), x @ decoded[0] @ decoded[1], rtol=1e-5, atol=1e-5)

    model = qjax.quantize_model(Named(0, nnx.StateAxes({nnx.Param: 0, ...: None})), F32)
    with pytest.raises(ValueError, match=r"whole stack of weights, \[2\] .*qjax.nnx.QuantParam"):
        model(x)

    with pytest.warns(UserWarning, match=r"kernel: shape \(32, 2, 32\) .*; stack layers along axi"):
        model = qjax.quantize_model(Named(1, nnx.StateAxes({nnx.Param: 1, ...: 0})), F32)
    assert "stack layers along axis 0" in qjax.report(model)["layers/kernel"].note


def test_stacked_layers(mode):
    model = Stack(nnx.Rngs(0))
    floats = np.asarray(model.layers.layers[0].kernel[...])
    model = qjax.quantize_model(model, F32)
    first, second = model.layers.layers[0].kernel.q, model.layers.layers[2].kernel.q
    assert first.shape == (2, 32, 64)
    assert first.batch_shape == (2,)
    assert second.shape == (2, 64, 2, 16)
    for i in range(2):  # each slice on its own
        alone = qjax.quantize(jnp.asarray(floats[i]), F32)
        np.testing.assert_array_equal(first.packed[i], alone.packed)
    x = jnp.ones((3, 32))
    want = x
    w, v = first.dequantize(), second.dequantize()
    for i in range(2):
        want = (jax.nn.relu(want @ w[i]) @ v[i].reshape(64, 32)).reshape(x.shape)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, x), want, rtol=1e-4, atol=1e-5)
    model = qjax.add_lora(model, qjax.LoraConfig(rank=4, dropout=0.5), rngs=nnx.Rngs(1))
    assert model.layers.layers[2].lora_a.shape == (2, 64, 4)
    assert model.layers.layers[2].lora_b.shape == (2, 4, 2, 16)
    a = model.layers.layers[0].lora_a[...]
    assert not jnp.array_equal(a[0], a[1])
    np.testing.assert_allclose(model(x), want, rtol=1e-4, atol=1e-5)


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


class Scaled(nnx.Linear):
    """A foreign layer with code of its own."""

    def __call__(self, x):
        return 2.0 * (x @ self.kernel[...])


def test_foreign_subclass_reads_a_decoded_weight():
    model = nnx.Sequential(Scaled(64, 8, rngs=nnx.Rngs(0)), nnx.relu)
    with pytest.warns(UserWarning, match=r"decode their whole 4-bit weight .*: layers/0/kernel"):
        qjax.quantize_model(model, F32)
    layer, x = model.layers[0], jnp.ones((2, 64))
    assert type(layer) is Scaled
    np.testing.assert_array_equal(layer(x), 2.0 * (x @ layer.kernel.q.dequantize()))
    qjax.add_lora(model, qjax.LoraConfig(rank=4, include="layers/0"), rngs=nnx.Rngs(0))
    layer.kernel_lora_b[...] = jnp.ones((4, 8))
    merged = qjax.merge_lora(model, jnp.float32).layers[0]
    assert type(merged) is Scaled
    np.testing.assert_allclose(layer(x), merged(x), rtol=1e-6)
    assert np.abs(layer(x) - 2.0 * (x @ layer.kernel.q.dequantize())).max() > 0.1


def test_convolutions_that_are_matmuls():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Conv(3, 64, (3, 3), rngs=rngs),
        nnx.Conv(64, 48, (1, 1), strides=2, rngs=rngs),
        nnx.Conv(48, 64, (1, 1), padding="VALID", use_bias=False, rngs=rngs),
        nnx.Conv(64, 64, (1, 1), feature_group_count=2, rngs=rngs),
    )
    plain = nnx.clone(model)
    qjax.quantize_model(model, F32)
    kinds = [type(layer) for layer in model.layers]
    assert kinds == [nnx.Conv, QuantConv, QuantConv, nnx.Conv]
    for layer, other in zip(model.layers[1:3], plain.layers[1:3], strict=True):
        other.kernel.set_value(layer.kernel.q.dequantize())
    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 3))
    # float32 sums in another order.
    np.testing.assert_allclose(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert qjax.report(model)["layers/0/kernel"].note == "convolutions are kept"
    with pytest.raises(ValueError, match=r"kernel_size=\(3, 3\) is no matmul"):
        QuantConv(64, 8, (3, 3), rngs=rngs)


def test_normalized_weights_are_left_alone():
    layer, x = nnx.WeightNorm(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)), jnp.ones(64)
    before = layer(x)
    qjax.quantize_model(layer)
    assert type(layer.layer_instance) is nnx.Linear
    # It normalizes what the last call left, so a second call rounds once more.
    np.testing.assert_allclose(layer(x), before, rtol=1e-5)
    note = qjax.report(layer)["layer_instance/kernel"].note
    assert note == "its weight is normalized at each call"


def test_own_product_is_kept():
    calls = []

    def product(*args, **kwargs):
        calls.append(args)
        return jax.lax.dot_general(*args, **kwargs)

    layer = nnx.Linear(64, 8, dot_general=product, rngs=nnx.Rngs(0))
    with pytest.warns(UserWarning, match="products of their own"):
        qjax.quantize_model(layer, F32)
    layer(jnp.ones((2, 64)))
    assert len(calls) == 1


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


class TestLora:
    cfg = qjax.LoraConfig(rank=4, alpha=12)

    def model(self, cfg=None, quant=F32):
        model = qjax.quantize_model(Model(nnx.Rngs(0)), quant)
        return qjax.add_lora(model, cfg or self.cfg, rngs=nnx.Rngs(1))

    def test_every_quantized_layer_and_no_other(self, mode):
        model = self.model()
        adapters = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
        paths = {"/".join(map(str, path)) for path, _ in adapters}
        assert paths == {f"{p}/lora_{x}" for p in QUANTIZED for x in "ab"}
        plain = qjax.quantize_model(Model(nnx.Rngs(0)), F32)
        np.testing.assert_array_equal(model(IDS), plain(IDS))  # B is zero

    def test_include_and_exclude(self):
        model = self.model(qjax.LoraConfig(4, include="attn", exclude="attn/(key|value)$"))
        have = {p for p, m in modules(model).items() if getattr(m, "lora_a", None) is not None}
        assert have == {f"blocks/{i}/attn/{n}" for i in range(2) for n in ("query", "out")}

    def test_on_a_float_layer_that_is_asked_for(self):
        model = self.model(qjax.LoraConfig(4, include=["lm_head", "embed"]))
        assert type(model.lm_head) is LoraLinear
        plain = qjax.quantize_model(Model(nnx.Rngs(0)), F32)
        np.testing.assert_array_equal(model(IDS), plain(IDS))
        for layer in (model.lm_head, model.embed):
            layer.lora_b[...] = jax.random.normal(jax.random.key(0), layer.lora_b.shape)
        merged = qjax.merge_lora(model, jnp.float32)
        assert type(merged.lm_head) is nnx.Linear
        # float32 sums in another order.
        np.testing.assert_allclose(merged(IDS), model(IDS), rtol=1e-3, atol=1e-3)

    def test_merge_is_exact(self, mode):
        model = self.model(quant=qjax.QuantConfig(compute_dtype=jnp.float32))
        for path in QUANTIZED:
            layer = modules(model)[path]
            layer.lora_b[...] = 0.1 * jax.random.normal(jax.random.key(0), layer.lora_b.shape)
        before = np.asarray(model(IDS))
        merged = qjax.merge_lora(model, dtype=jnp.float32)
        layer, plain = model.blocks[0].attn.out, merged.blocks[0].attn.out
        assert type(plain) is nnx.LinearGeneral
        assert {type(m) for m in modules(merged).values()} == {
            type(m) for m in modules(Model(nnx.Rngs(0))).values()
        }
        w = np.asarray(layer.kernel.q.dequantize(), np.float64)
        a, b = np.asarray(layer.lora_a[...], np.float64), np.asarray(layer.lora_b[...], np.float64)
        # One float32 sum of numbers below 1: a few units in the last place.
        np.testing.assert_allclose(
            plain.kernel[...], w + 3.0 * np.einsum("nhr,rd->nhd", a, b), atol=1e-6
        )
        np.testing.assert_allclose(merged(IDS), before, rtol=1e-3, atol=1e-3)
        narrow = qjax.merge_lora(model).blocks[0].attn.out
        assert narrow.kernel.dtype == narrow.bias.dtype == jnp.bfloat16
        np.testing.assert_array_equal(model(IDS), before)  # the model keeps its adapters
        assert layer.bias.dtype == jnp.float32

    def test_dequantize_keeps_adapters(self):
        model = self.model()
        plain = qjax.dequantize_model(model)
        assert type(plain.by_name["out"]) is LoraLinear
        assert plain.by_name["out"].kernel.dtype == jnp.float32
        np.testing.assert_allclose(plain(IDS), model(IDS), rtol=1e-4, atol=1e-4)
        again = qjax.quantize_model(plain, F32)
        assert quantized(again) == QUANTIZED
        assert again.by_name["out"].lora_a is not None

    def test_refusals(self):
        model = self.model()
        with pytest.raises(ValueError, match="by_name/out has an adapter already"):
            qjax.add_lora(model, qjax.LoraConfig(include="by_name"), rngs=nnx.Rngs(0))
        with pytest.raises(
            ValueError, match=r"include=.q_proj. matches no dense layer; there are:"
        ):
            qjax.add_lora(model, qjax.LoraConfig(include="q_proj"), rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"no layer is in 4 bits, .*call quantize_model"):
            qjax.add_lora(Model(nnx.Rngs(0)), self.cfg, rngs=nnx.Rngs(0))
        with pytest.raises(TypeError, match=re.escape("rngs must be an nnx.Rngs, got int")):
            qjax.add_lora(model, self.cfg, rngs=0)
        with pytest.raises(ValueError, match="Linear has no layer in 4 bits"):
            qjax.merge_lora(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
        with pytest.raises(TypeError, match="got list"):
            qjax.dequantize_model([])

    def test_linen_trees(self):
        params = qjax.quantize_params({"dense": {"kernel": jnp.ones((64, 8))}})
        w = params["dense"]["kernel"].q.dequantize()
        np.testing.assert_array_equal(qjax.dequantize_model(params)["dense"]["kernel"], w)
        assert qjax.merge_lora(params)["dense"]["kernel"].dtype == jnp.bfloat16

    def test_norms_hold_no_adapter(self):
        message = "include='norm' matches no dense layer"
        with pytest.raises(ValueError, match=message):
            qjax.add_lora(self.model(), qjax.LoraConfig(include="norm"), rngs=nnx.Rngs(0))
