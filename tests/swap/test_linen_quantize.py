"""quantize_params: which leaves, along which axes, and what it refuses."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze

import qjax
from qjax.linen import QuantBox, QuantDense
from qjax.swap.linen import dequantize_params
from qjax.swap.linen_guess import guess_uses
from tests.swap.linen_models import Loop, Scanned, make, max_error

CFG = qjax.QuantConfig(block_size=32, double_quant=False)
ATTENTION = {"query": (0,), "key": (0,), "value": (0,), "out": (0, 1)}


def boxes(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=nn.meta.is_axis_metadata)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
        if isinstance(leaf, QuantBox)
    }


def expected_axes(prefixes, batch):
    expected = {}
    for prefix in prefixes:
        for name, axes in ATTENTION.items():
            expected[f"{prefix}/attn/{name}/kernel"] = (axes, batch)
        for name in ("gate", "up", "down"):
            expected[f"{prefix}/{name}/kernel"] = ((0,), batch)
    return expected


def axes_of(tree):
    return {
        path: (box.q.contract_axes, len(box.q.batch_shape)) for path, box in boxes(tree).items()
    }


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("cls, prefixes", [(Loop, ["layer_0", "layer_1"]), (Scanned, ["layers"])])
def test_axes_are_the_same_guessed_and_traced(cls, prefixes, use_bias):
    model, params, ids = make(cls, use_bias=use_bias, abstract=True)
    expected = expected_axes(prefixes, int(cls is Scanned))
    guessed = qjax.quantize_params(params, CFG)
    traced = qjax.quantize_params(params, CFG, module=model, example_args=(ids,))
    assert axes_of(guessed) == axes_of(traced) == expected
    assert jax.tree.structure(guessed) == jax.tree.structure(traced)


def test_defaults_keep_embeddings_head_norms_and_routers():
    _, params, _ = make(Loop, abstract=True)
    quantized = qjax.quantize_params(params, CFG)
    assert set(boxes(quantized)) == set(expected_axes(["layer_0", "layer_1"], 0))
    for name in ("embed", "lm_head", "norm"):
        assert quantized[name] == params[name]


def test_a_gate_with_few_outputs_routes_unless_a_layer_beside_it_has_its_shape():
    def kernels(**widths):
        return {
            name: {"kernel": jax.ShapeDtypeStruct((64, width), jnp.float32)}
            for name, width in widths.items()
        }

    params = {"mlp": kernels(gate=128, up=128), "moe": kernels(gate=8, up=128)}
    assert set(boxes(qjax.quantize_params(params, CFG))) == {
        *("mlp/gate/kernel", "mlp/up/kernel", "moe/up/kernel")
    }


def test_values_are_those_of_quantize():
    _, params, _ = make(Scanned)
    cfg = qjax.QuantConfig(overrides={"down": {"format": "fp4"}, "attn": {"double_quant": False}})
    quantized = qjax.quantize_params(params, cfg)["layers"]
    down, out = quantized["down"]["kernel"].q, quantized["attn"]["out"]["kernel"].q
    assert (down.format, down.double_quant, out.double_quant) == ("fp4", True, False)
    for layer in range(2):  # slice by slice, though quantized as a stack
        w = params["layers"]["attn"]["out"]["kernel"][layer]
        alone = qjax.quantize(w, cfg.at("attn"), contract_axes=(0, 1))
        np.testing.assert_array_equal(out.packed[layer], alone.packed)
        np.testing.assert_array_equal(out.scales[layer], alone.scales)


@pytest.mark.parametrize("cls", [Loop, Scanned])
def test_a_model_whose_dense_layers_are_replaced_takes_the_same_tree(cls):
    cfg = dataclasses.replace(CFG, include="gate|up|down|lm_head", compute_dtype=jnp.float32)
    model, params, ids = make(cls, use_bias=True)
    ours, shapes, _ = make(
        cls, use_bias=True, dense=functools.partial(QuantDense, config=cfg), abstract=True
    )
    theirs = qjax.quantize_params(params, cfg)
    describe = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
    assert describe(shapes) == describe(theirs)
    assert jax.tree.structure(shapes) == jax.tree.structure(theirs)
    # And a tree in which more, or less, is in 4 bits.
    for include in ("gate|up|down|lm_head", "layer", "down"):
        tree = qjax.quantize_params(params, dataclasses.replace(cfg, include=include))
        expected = model.apply({"params": dequantize_params(tree)}, ids)
        y = jax.jit(ours.apply)({"params": tree}, ids)
        assert max_error(y, expected) < 1e-5  # float32 products in another order


def test_containers_and_variables_keep_their_kind():
    params = {"up": {"kernel": jnp.ones((64, 8))}}
    frozen = qjax.quantize_params(freeze(params), CFG)
    assert isinstance(frozen, FrozenDict) and isinstance(frozen["up"]["kernel"], QuantBox)
    stats = {"norm": {"mean": jnp.zeros(3)}}
    variables = qjax.quantize_params({"params": params, "batch_stats": stats}, CFG)
    assert isinstance(variables["params"]["up"]["kernel"], QuantBox)
    assert variables["batch_stats"] == stats
    # What is in 4 bits stays: a second pass takes what the first left.
    again = qjax.quantize_params(variables, CFG)
    assert again["params"]["up"]["kernel"] is variables["params"]["up"]["kernel"]


def test_partitioned_kernels_keep_their_names():
    w = nn.Partitioned(jnp.ones((64, 8)), ("embed", "mlp"))
    box = qjax.quantize_params({"up": {"kernel": w}}, CFG)["up"]["kernel"]
    assert isinstance(box, QuantBox) and box.names == ("embed", "mlp")


def test_a_trace_knows_what_names_and_shapes_do_not():
    """Layers without bias, norm or telling name; an equation; a shared table; stacks of stacks."""

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.DenseGeneral((4, 16), use_bias=False, name="a")(x)
            h = nn.DenseGeneral(32, axis=(-2, -1), use_bias=False, name="b")(h)
            return nn.Einsum((3, 32, 64), "bd,edf->bef", use_bias=False, name="c")(h).sum(1), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids, scale=1.0, *, train):
            assert train is False
            embed = nn.Embed(8, 64, name="embed")
            x = embed(ids)
            x = x + nn.Conv(64, (3,), name="mix")(x[None])[0]
            stack = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            x, _ = nn.scan(nn.scan(Inner, **stack), **stack)(name="blocks")(x * scale)
            return embed.attend(x)

    model, ids = Model(), jnp.arange(5)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), ids, train=False))["params"]
    cfg = qjax.QuantConfig(block_size=32, include=("blocks", "embed"))
    kwargs = {"train": False, "rngs": None}
    traced = qjax.quantize_params(
        shapes, cfg, module=model, example_args=(ids, 0.5), example_kwargs=kwargs
    )
    assert axes_of(traced) == {
        "embed/embedding": ((1,), 0),
        "blocks/a/kernel": ((0,), 2),
        "blocks/b/kernel": ((0, 1), 2),
        "blocks/c/kernel": ((1,), 2),
    }
    explicit = qjax.quantize_params(
        shapes,
        qjax.QuantConfig(block_size=32, include="blocks"),
        batch_ndim={"blocks": 2},
        contract_axes={"/a/": (0,), "/b/": (0, 1), "/c/": (1,)},
    )
    assert axes_of(explicit) == {k: v for k, v in axes_of(traced).items() if "blocks" in k}
    with pytest.warns(UserWarning, match="left in floating point: blocks/a/kernel: its shape"):
        untold = qjax.quantize_params(shapes, CFG)
    assert not boxes(untold)
    with pytest.raises(ValueError, match=r"include='blocks' matches only .*blocks/a/kernel: its"):
        qjax.quantize_params(shapes, qjax.QuantConfig(include="blocks"))


def test_a_layer_that_the_trace_does_not_know_is_read_by_its_shape():
    """OptimizedLSTMCell reads raw parameters: its kernels are decoded where it reads them."""
    model, x = nn.RNN(nn.OptimizedLSTMCell(32)), jnp.ones((2, 3, 64))
    params = model.init(jax.random.key(0), x)["params"]
    quantized = qjax.quantize_params(params, CFG, module=model, example_args=(x,))
    assert len(boxes(quantized)) == 8
    # Outside jit: the cell's scan closes over arrays that have values.
    y = qjax.apply(model, {"params": quantized}, x)
    expected = model.apply({"params": dequantize_params(quantized)}, x)
    assert max_error(y, expected) < 1e-5  # float32 products in another order


@pytest.mark.parametrize("axes", [(1,), (1, 0), (2, 1)])
def test_layers_stacked_along_another_axis(axes):
    model, x = Lifted(axes), jnp.ones((2, 48))
    params = model.init(jax.random.key(0), x)["params"]
    cfg = dataclasses.replace(CFG, compute_dtype=jnp.float32)
    quantized = qjax.quantize_params(params, cfg, module=model, example_args=(x,))
    (box,) = boxes(quantized).values()
    assert (box.q.batch_shape, box.q.slice_shape) == ((3,) * len(axes), (48, 48))
    assert box.names == (*("layers_2", "layers_1")[-len(axes) :], "in", "out")
    floats = dequantize_params(quantized)
    assert jax.tree.map(jnp.shape, floats) == jax.tree.map(jnp.shape, params)
    assert jax.tree.structure(floats) == jax.tree.structure(params)  # names, too
    # NF4 of normal numbers; were a slice another's, the error would be as large as the numbers.
    error = jax.tree.map(lambda a, b: jnp.abs(a - b).mean() / jnp.abs(b).mean(), floats, params)
    assert max(jax.tree.leaves(error)) < 0.15
    expected = model.apply({"params": floats}, x)
    for y in (
        qjax.apply(model, {"params": quantized}, x),
        model.apply({"params": quantized}, x),
        jax.jit(model.apply)({"params": quantized}, x),
    ):
        assert max_error(y, expected) < 1e-5  # float32 products in another order


class Lifted(nn.Module):
    """A layer in scans, each along its own axis."""

    axes: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        if not self.axes:
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
            return nn.Dense(48, use_bias=False, kernel_init=init, name="up")(x)
        scan = nn.scan(
            lambda module, x, _: (module(x), None),
            variable_axes={"params": self.axes[0]},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: f"layers_{len(self.axes)}"},
        )
        return scan(Lifted(self.axes[1:], name="inner"), x, None)[0]


@pytest.mark.parametrize(
    "name, shape, bias, expected",
    [
        ("up", (64, 8), None, ((0,), 0)),
        ("up", (3, 64, 8), (3, 8), ((0,), 1)),
        ("q_proj", (64, 4, 16), (4, 16), ((0,), 0)),
        ("o_proj", (4, 16, 64), (64,), ((0, 1), 0)),
        ("o_proj", (3, 4, 16, 64), (3, 64), ((0, 1), 1)),
        ("query", (64, 4, 16), None, ((0,), 0)),
        ("out", (4, 16, 64), None, ((0, 1), 0)),
        ("query", (3, 64, 4, 16), None, ((0,), 1)),
        ("out", (3, 64, 64), (3, 64), ((0,), 1)),  # a stacked Dense that is called out
        ("patches", (16, 16, 3, 64), (64,), "convolutions are kept"),
        ("Conv_0", (3, 3, 64), (64,), "convolutions are kept"),
        ("mix", (3, 64, 64), (64,), "does not tell which axes"),  # a convolution in one dimension?
        ("up", (3, 64, 8), None, "does not tell which axes"),
    ],
)
def test_reading_names_and_shapes(name, shape, bias, expected):
    shapes = {f"x/{name}/kernel": shape}
    if bias is not None:
        shapes[f"x/{name}/bias"] = bias
    use = guess_uses(shapes)[f"x/{name}/kernel"]
    if isinstance(expected, str):
        assert expected in use.problem
    else:
        assert (use.contract_axes, use.batch_ndim, use.problem) == (*expected, None)


@pytest.mark.parametrize("evidence", ["ScanBlock_0/up/kernel", "norm", "batch_ndim"])
def test_what_tells_that_layers_are_stacked(evidence):
    path = evidence if "/" in evidence else "layers/up/kernel"
    shapes = {path: (3, 64, 8), "norm/scale": (64,)}
    if evidence == "norm":
        shapes["layers/norm/scale"] = (3, 64)
    stacked = {path: 1} if evidence == "batch_ndim" else None
    use = guess_uses(shapes, stacked)[path]
    assert (use.contract_axes, use.batch_ndim, use.problem) == ((0,), 1, None)


def test_bad_weights_are_named():
    ok = jnp.ones((64, 8))
    with pytest.raises(ValueError, match="mlp/up/kernel holds NaN or inf"):
        qjax.quantize_params({"mlp": {"up": {"kernel": ok.at[0, 0].set(jnp.nan)}}}, CFG)
    with pytest.raises(TypeError, match="mlp/up/kernel must be a floating array, got int32"):
        qjax.quantize_params({"mlp": {"up": {"kernel": ok.astype(int)}}}, CFG)
    with pytest.raises(TypeError, match="up/kernel must be a floating array, got complex64"):
        qjax.quantize_params({"up": {"kernel": ok.astype(complex)}}, CFG)


def test_arguments_that_do_nothing_are_refused():
    params = {"up": {"kernel": jnp.ones((64, 8))}}
    with pytest.raises(ValueError, match=r"include='attn' matches no kernel .*up/kernel"):
        qjax.quantize_params(params, qjax.QuantConfig(include="attn"))
    with pytest.warns(UserWarning, match=r"exclude='attn' matches no kernel .*up/kernel"):
        qjax.quantize_params(params, qjax.QuantConfig(exclude="attn"))
    with pytest.raises(TypeError, match="cfg must be a QuantConfig, got 'fp4'"):
        qjax.quantize_params(params, "fp4")
    with pytest.raises(ValueError, match="contract_axes: 'attn' matches no parameter"):
        qjax.quantize_params(params, CFG, contract_axes={"attn": (0,)})
    with pytest.raises(ValueError, match="batch_ndim: 'attn' matches no parameter"):
        qjax.quantize_params(params, CFG, batch_ndim={"attn": 1})
    with pytest.raises(ValueError, match="need module="):
        qjax.quantize_params(params, CFG, example_args=(jnp.ones(3),))
    with pytest.raises(ValueError, match="no kernel or embedding"):
        qjax.quantize_params({"norm": {"scale": jnp.ones(3)}}, CFG)
    with pytest.raises(TypeError, match="params must be a dict or FrozenDict, got list"):
        qjax.quantize_params([jnp.ones(3)], CFG)
