"""DoRA in NNX and Linen layers, against float64 and JAX's own gradient of the merged weight."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.nn.lora import LoraConfig
from qjax.nn.nnx_linear import LoraLinear
from tests.nn.nnx_layers import CASES, F32, build, call, inputs

DORA = LoraConfig(rank=4, alpha=12, dora=True)
FAST = ("linear", "einsum_middle")
DENSE = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in CASES
    if name != "embed_attend"
]
# Tolerances of 2e-4 are for float32 sums of some 64 terms in another order, as in
# test_nnx_layers.py; those of 1e-5 for merged weights of some 64 * 2**-24.


def contract_axes(adapter: str) -> tuple[int, ...]:
    """The summed axes of the whole weight of "A,B->W": those of A but not of B."""
    a, b, w = adapter.replace("->", ",").split(",")
    return tuple(i for i, axis in enumerate(w) if axis in a and axis not in b)


def merged(w, a, b, magnitude, scaling, adapter):
    """The definition (Liu et al. 2024, equation 5), the norm a constant."""
    w = w + scaling * jnp.einsum(adapter, a, b)
    axes = contract_axes(adapter)
    norm = jax.lax.stop_gradient(jnp.sqrt((w * w).sum(axis=axes)))
    return w * jnp.expand_dims(magnitude / norm, axes)


def add_bias(y, layer, case):
    if layer.bias is None:
        return y
    shape = layer.bias.shape
    if case.kwargs.get("batch_axis") or case.equation.endswith("nth"):
        shape = (shape[0], 1, *shape[1:])
    return y + layer.bias[...].reshape((1,) * (y.ndim - len(shape)) + shape)


@pytest.mark.parametrize("name", DENSE)
def test_result_and_gradient_are_those_of_the_definition(name):
    case = CASES[name]
    layer = build(case, lora=DORA)
    layer.lora_magnitude[...] = layer.lora_magnitude[...] * 1.5
    x, w = inputs(case), getattr(layer, case.weight).q.dequantize()
    graphdef, lora, rest = nnx.split(layer, nnx.LoRAParam, ...)

    def ours(lora, x):
        y = call(nnx.merge(graphdef, lora, rest), case, x)
        return (y**2).sum(), y

    def plain(lora, x):
        a, b, m = (lora[n][...] for n in ("lora_a", "lora_b", "lora_magnitude"))
        weight = merged(w, a, b, m, DORA.scaling, case.adapter)
        y = add_bias(jnp.einsum(case.equation, x, weight), layer, case)
        return (y**2).sum(), y

    found, expected = (jax.grad(f, (0, 1), has_aux=True)(lora, x) for f in (ours, plain))
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4 * np.abs(want).max())
    a, b, m = (np.asarray(lora[n][...], np.float64) for n in ("lora_a", "lora_b", "lora_magnitude"))
    delta = np.asarray(w, np.float64) + DORA.scaling * np.einsum(case.adapter, a, b)
    axes = contract_axes(case.adapter)
    weight = delta * np.expand_dims(m / np.sqrt((delta**2).sum(axis=axes)), axes)
    np.testing.assert_allclose(layer.float_weight(), weight, rtol=1e-5, atol=1e-5)


def test_a_new_one_changes_nothing_and_none_is_for_embeddings():
    layer = build(CASES["general"], lora=DORA)
    layer.lora_b[...] = jnp.zeros_like(layer.lora_b[...])
    plain, x = build(CASES["general"]), inputs(CASES["general"])
    np.testing.assert_allclose(layer(x), plain(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="dora=True for an embedding"):
        build(CASES["embed_attend"], lora=DORA)
    abstract = nnx.eval_shape(lambda: build(CASES["general"], lora=DORA))
    assert abstract.lora_magnitude.shape == (2, 3)


def test_dropout_acts_on_what_the_adapter_changes():
    """As PEFT: y = x W + (m / n - 1) drop(x) W + (m / n) s drop(x) A B; here B = 0 and m = 2 n."""
    layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(8.0)
    layer.__class__ = LoraLinear
    layer.init_adapter(dataclasses.replace(DORA, dropout=0.5), nnx.Rngs(0))
    layer.lora_magnitude[...] = layer.lora_magnitude[...] * 2
    x = jnp.ones((1, 8))
    w = np.asarray(layer.kernel[...], np.float64)
    base = w.sum(0) + np.arange(8.0)
    dropped = (np.asarray(layer(x), np.float64)[0] - base) @ np.linalg.inv(w)
    # Kept elements count twice; the inverse of an 8 x 8 matrix enlarges float32's rounding.
    assert (np.minimum(np.abs(dropped), np.abs(dropped - 2)) < 1e-3).all()
    assert 0 < np.round(dropped / 2).sum() < 8
    layer.eval()
    np.testing.assert_allclose(layer(x)[0], base + w.sum(0), rtol=1e-5, atol=1e-5)


class Heads(nn.Module):
    """A Dense, a DenseGeneral and an Einsum."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(64, name="dense")(x)
        x = nn.DenseGeneral((2, 32), name="general")(x)
        x = nn.DenseGeneral(64, axis=(-2, -1), name="out")(x)
        return nn.Einsum((64, 3), "bd,df->fb", name="einsum")(x)


@pytest.fixture(scope="module")
def linen():
    module, x = Heads(), jax.random.normal(jax.random.key(0), (2, 64))
    params = module.init(jax.random.key(1), x)["params"]
    params["einsum"]["bias"] = jnp.arange(3.0)
    params = qjax.quantize_params(params, F32, module=module, example_args=(x,))
    params = qjax.add_lora_params(params, DORA, jax.random.key(2))
    keys = iter(jax.random.split(jax.random.key(3), 100))

    def fill(path, leaf):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name == "lora_b":
            return 0.1 * jax.random.normal(next(keys), leaf.shape)
        return leaf * 1.5 if name == "lora_magnitude" else leaf

    return module, jax.tree_util.tree_map_with_path(fill, params), x


def test_linen_gives_the_same_through_the_box_and_through_the_routes(linen):
    """The decoded box multiplies by the definition's weight; the routes never form it."""
    module, params, x = linen
    trainable, frozen = qjax.partition(params)
    assert len(jax.tree.leaves(trainable)) == 12

    def loss(call, trainable):
        y = call({"params": qjax.combine(trainable, frozen)}, x)
        return (y**2).sum(), y

    routed = jax.grad(lambda t: loss(lambda v, x: qjax.apply(module, v, x), t), has_aux=True)
    boxed = jax.grad(lambda t: loss(module.apply, t), has_aux=True)
    found, expected = routed(trainable), boxed(trainable)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4 * np.abs(want).max())


def test_linen_box_is_the_definitions_weight(linen):
    _, params, _ = linen
    box = params["general"]["kernel"]
    w, a, b, m = (
        np.asarray(v, np.float64)
        for v in (box.q.dequantize(), box.lora_a, box.lora_b, box.lora_magnitude)
    )
    w = w + DORA.scaling * np.einsum("kr,rno->kno", a, b)
    expected = w * (m / np.sqrt((w**2).sum(0)))
    np.testing.assert_allclose(box.unbox(), expected, rtol=1e-5, atol=1e-5)
    merged = qjax.merge_lora(params, jnp.float32)["general"]["kernel"]
    np.testing.assert_array_equal(merged, box.merged(jnp.float32))


def test_linen_magnitudes_are_saved_and_sharded(linen, tmp_path):
    _, params, _ = linen
    qjax.save(tmp_path / "all", params)
    again = qjax.load(tmp_path / "all")
    magnitude = params["general"]["kernel"].lora_magnitude
    np.testing.assert_array_equal(again["general"]["kernel"].lora_magnitude, magnitude)
    box = dataclasses.replace(params["general"]["kernel"], names=("in", "heads", "dim"))
    assert box.get_partition_spec().lora_magnitude == jax.sharding.PartitionSpec("heads", "dim")


def test_linen_has_none_for_embeddings():
    params = nn.Embed(8, 64).init(jax.random.key(0), jnp.zeros(1, jnp.int32))["params"]
    params = qjax.quantize_params(params, dataclasses.replace(F32, include="embedding"))
    with pytest.raises(NotImplementedError, match=r"embedding: dora=True for an embedding"):
        qjax.add_lora_params(params, DORA, jax.random.key(0))
