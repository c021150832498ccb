"""The report against bytes counted by hand, for NNX models and for plain trees."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax

SINGLE = qjax.QuantConfig(double_quant=False)


def bytes_by_hand(tree) -> int:
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(10, 64, rngs=rngs)
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.odd = nnx.Linear(96, 64, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.lm_head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, ids, twice=False):
        x = self.norm(self.odd(self.up(self.embed(ids))[..., :96]))
        if twice:
            x = self.up(x)[..., :64]
        return self.lm_head(x)


def make(cfg=SINGLE):
    return qjax.quantize_model(Model(nnx.Rngs(0)), cfg)


class TestRows:
    def test_four_bit_weight(self):
        row = qjax.report(make())["up/kernel"]
        assert (row.shape, row.format, row.block_size) == ((64, 128), "nf4", 64)
        assert (row.double_quant, row.layout) == (False, "rows")
        assert row.nbytes == 64 * 128 // 2 + 128 * 4
        assert row.bits_per_param == 4.5
        assert row.float_nbytes == 64 * 128 * 4
        assert row.note == ""

    def test_double_quantization_counts_its_tables(self):
        row = qjax.report(make(qjax.QuantConfig()))["up/kernel"]
        assert row.double_quant
        assert row.nbytes == 64 * 128 // 2 + 128 + 4 + 4  # codes, scales, one absmax, the offset

    def test_block_that_does_not_divide(self):
        row = qjax.report(make())["odd/kernel"]
        assert row.layout == "flat"
        assert "block_size=64 does not divide K=96" in row.note

    def test_why_weights_stay(self):
        report = qjax.report(make(qjax.QuantConfig(exclude="odd")))
        assert report["embed/embedding"].note == "embeddings are kept by default"
        assert report["lm_head/kernel"].note == "the output head is kept by default"
        assert report["odd/kernel"].note == "matches exclude=('odd',)"
        assert report["up/bias"].note == "vectors are kept"
        assert report["odd/kernel"].format == "float32"

    def test_reasons_survive_split_and_merge(self):
        model = nnx.merge(*nnx.split(make(qjax.QuantConfig(include="up"))))
        assert qjax.report(model)["odd/kernel"].note == "not in include=('up',)"

    def test_float_model(self):
        report = qjax.report(Model(nnx.Rngs(0)))
        assert report["up/kernel"].note == "not quantized"
        assert report.totals.quantized_params == 0
        assert report.totals.nbytes == report.totals.float_nbytes

    def test_unknown_path(self):
        with pytest.raises(KeyError, match="down/kernel"):
            qjax.report(make())["down/kernel"]


class TestTotals:
    def test_bytes_are_those_of_the_arrays(self):
        model = qjax.add_lora(make(), qjax.LoraConfig(4, dropout=0.1), rngs=nnx.Rngs(0))
        report = qjax.report(model)
        # A random key is two uint32.
        keys, rest = nnx.state(model, nnx.RngKey, ...)
        want = bytes_by_hand(rest) + 8 * len(jax.tree.leaves(keys))
        assert report.totals.nbytes == qjax.memory_footprint(model) == want
        assert report.totals.adapter_params == 4 * (64 + 128 + 96 + 64)
        floats = qjax.report(Model(nnx.Rngs(0))).totals
        assert report.totals.params == floats.params + report.totals.adapter_params
        assert qjax.memory_footprint(nnx.state(model)) == want

    def test_stacked_and_abstract(self):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def layers(rngs):
            return nnx.Linear(64, 128, rngs=rngs)

        model = qjax.quantize_model(layers(nnx.Rngs(0)))
        row = qjax.report(model)["kernel"]
        assert row.shape == (3, 64, 128)
        assert row.nbytes == 3 * (64 * 128 // 2 + 128 + 4 + 4)
        abstract = qjax.quantize_model(nnx.eval_shape(lambda: layers(nnx.Rngs(0))))
        assert qjax.report(abstract).totals == qjax.report(model).totals

    def test_shared_arrays_count_once(self):
        layer = nnx.Linear(64, 8, use_bias=False, rngs=nnx.Rngs(0))
        model = nnx.Sequential(layer, layer)
        assert qjax.memory_footprint(model) == 64 * 8 * 4
        w = layer.kernel[...]
        assert qjax.memory_footprint({"a": w, "b": w}) == 64 * 8 * 4

    def test_qtensor_and_scalars(self):
        q = qjax.quantize(jnp.ones((64, 8)), SINGLE)
        assert qjax.memory_footprint(q) == q.nbytes == bytes_by_hand(q)
        assert qjax.memory_footprint({"a": q, "step": 3, "none": None}) == q.nbytes


class TestTable:
    def test_small_model(self):
        text = str(qjax.report(make()))
        lines = [line.split() for line in text.splitlines()]
        assert lines[0] == [
            "path",
            "shape",
            "format",
            "block",
            "layout",
            "bits/param",
            "bytes",
            "note",
        ]
        row = next(line for line in lines if line[:1] == ["up/kernel"])
        assert row[1:] == ["[64,", "128]", "nf4", "64", "rows", "4.500", "4,608"]
        assert "embeddings are kept by default" in text
        assert "in 4-bit weights of 4.500 bits" in text

    def test_long_models_are_grouped(self):
        layers = [nnx.Linear(64, 8, rngs=nnx.Rngs(0)) for _ in range(30)]
        report = qjax.report(qjax.quantize_model(nnx.List(layers), SINGLE))
        assert len(report.rows) == 60
        lines = str(report).splitlines()
        assert lines[2].startswith("*/kernel  30 x [64, 8]")
        assert len(lines) < 10
        assert f"{30 * (64 * 8 // 2 + 8 * 4):,}" in lines[2]


class TestTrees:
    """What Linen users have: dicts of arrays, QTensors or boxes around them."""

    tree = {
        "dense": {"kernel": jnp.ones((64, 8)), "bias": jnp.ones(8)},
        "embed": {"embedding": jnp.ones((10, 64))},
        "head": {"kernel": nn.Partitioned(jnp.ones((64, 8)), ("in", "out"))},
    }

    def test_plain_qtensors(self):
        tree = self.tree | {"mlp": {"kernel": qjax.quantize(jnp.ones((64, 8)), SINGLE)}}
        report = qjax.report({"params": tree})
        assert [row.path for row in report.rows] == [
            "params/dense/bias",
            "params/dense/kernel",
            "params/embed/embedding",
            "params/head/kernel",
            "params/mlp/kernel",
        ]
        assert report["params/mlp/kernel"].layout == "rows"
        assert report["params/dense/kernel"].note == "not quantized"
        assert report["params/embed/embedding"].note == "embeddings are kept by default"
        assert report["params/head/kernel"].note == "the output head is kept by default"
        assert report.totals.nbytes == qjax.memory_footprint(tree) == bytes_by_hand(tree)

    def test_boxes(self):
        @jax.tree_util.register_dataclass
        @dataclasses.dataclass
        class Box:
            q: Any
            lora_a: Any = None
            lora_b: Any = None

        q = qjax.quantize(jnp.ones((64, 8)), SINGLE)
        tree = {"x": {"kernel": Box(q, jnp.ones((64, 2)), jnp.ones((2, 8)))}, "y": Box(q)}
        report = qjax.report(tree)
        assert [row.path for row in report.rows] == [
            "x/kernel",
            "x/kernel/lora_a",
            "x/kernel/lora_b",
            "y",
        ]
        assert report.totals.adapter_params == 2 * (64 + 8)

    def test_what_ran_needs_a_function(self):
        with pytest.raises(TypeError, match=r"begin with what to call.*got int"):
            qjax.report(self.tree, 3)

    def test_a_module_without_arrays_is_refused(self):
        with pytest.raises(TypeError, match=r"x must be an NNX model.*got Dense\("):
            qjax.report(nn.Dense(4))


class TestWhatRan:
    def test_each_op(self):
        model = make(qjax.QuantConfig(include=["up", "odd", "embed"]))
        report = qjax.report(model, jnp.zeros((2, 3), jnp.int32))
        assert report["up/kernel"].uses == ("matmul: xla",)
        assert report["embed/embedding"].uses == ("take: rows decoded",)
        assert report["odd/kernel"].uses == ("decode: matmul in the flat layout",)
        assert report["up/bias"].uses is None
        assert "matmul: xla" in str(report)
        # Without example arguments nothing is said.
        assert qjax.report(model)["up/kernel"].uses is None

    def test_abstract_arguments_and_flags(self):
        ids = jax.ShapeDtypeStruct((2, 3), jnp.int32)
        report = qjax.report(make(), ids, twice=True)
        assert report["up/kernel"].uses == ("matmul: xla",)

    def test_unused_and_foreign(self):
        class Reads(nnx.Module):
            def __init__(self, rngs):
                self.used, self.idle = nnx.Linear(64, 8, rngs=rngs), nnx.Linear(64, 8, rngs=rngs)

            def __call__(self, x):
                return x @ self.used.kernel[...]

        model = qjax.quantize_model(Reads(nnx.Rngs(0)))
        report = qjax.report(model, jnp.ones((2, 64)))
        assert report["used/kernel"].uses == ("decode: whole weight",)
        assert report["idle/kernel"].uses == ()
        assert "not used" in str(report)

    def test_einsum_over_other_axes(self):
        model = nnx.Einsum("bk,kn->bn", (64, 64), rngs=nnx.Rngs(0))
        qjax.quantize_model(model)
        with pytest.warns(UserWarning, match="decodes the whole weight"):
            report = qjax.report(model, jnp.ones((2, 64)), einsum_str="bk,kn->bkn")
        assert report["kernel"].uses == ("decode: einsum 'bk,kn->bkn' sums over other axes",)

    def test_inside_jit_scan_and_remat_each_time(self):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def layers(rngs):
            return nnx.Linear(64, 64, rngs=rngs)

        class Scanned(nnx.Module):
            def __init__(self, rngs):
                self.layers = layers(rngs)

            def __call__(self, x):
                return _run(self.layers, x)

        model = qjax.quantize_model(Scanned(nnx.Rngs(0)))
        for _ in range(2):  # not even a cached inner jit hides a use
            report = qjax.report(model, jnp.ones((2, 64)))
            assert report["layers/kernel"].uses == ("matmul: xla",)

    def test_model_is_left_as_it_was(self):
        model = make()
        graphdef, state = nnx.split(model)
        before = [v.get_metadata() for v in jax.tree.leaves(state, is_leaf=is_variable)]
        qjax.report(model, jnp.zeros((2, 3), jnp.int32))
        after, state = nnx.split(model)
        assert graphdef == after
        assert [v.get_metadata() for v in jax.tree.leaves(state, is_leaf=is_variable)] == before

    @pytest.mark.parametrize("collections", [False, True])
    def test_linen(self, collections):
        model = nn.Sequential([nn.Dense(64), nn.Dense(8)])
        x = jnp.ones((2, 64))
        params = qjax.quantize_params(model.init(jax.random.key(0), x)["params"])
        prefix = "params/" if collections else ""
        report = qjax.report({"params": params} if collections else params, model, x)
        assert report[f"{prefix}layers_0/kernel"].uses == ("matmul: xla",)
        assert report[f"{prefix}layers_1/kernel"].uses == ("matmul: xla",)

    def test_trees(self):
        tree = {"w": qjax.quantize(jnp.ones((64, 8)))}
        report = qjax.report(tree, lambda tree, x: qjax.matmul(x, tree["w"]), jnp.ones((2, 64)))
        assert report["w"].uses == ("matmul: xla",)


def is_variable(x):
    return isinstance(x, nnx.Variable)


@nnx.jit
def _run(layers, x):
    step = nnx.remat(lambda layer, x: layer(x))
    return nnx.scan(step, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(layers, x)
