"""Quantize, decode and multiply on a mesh with explicit axes: types, bytes and numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.ops.lora import lora_einsum, lora_take, lora_weight


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("d", "t"))  # explicit is JAX's default


@pytest.fixture
def w(rng):
    return rng.standard_normal((512, 256), np.float32)


def put(a, mesh, *spec):
    return jax.device_put(a, NamedSharding(mesh, P(*spec)))


def spec_of(a):
    return (*a.sharding.spec, *[None] * (a.ndim - len(a.sharding.spec)))


@pytest.mark.parametrize("spec", [(None, "t"), ("t", None), ("d", "t")])
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_bytes_are_those_of_one_device(mesh, w, spec, double_quant):
    cfg = qjax.QuantConfig(double_quant=double_quant)
    expected, q = qjax.quantize(jnp.asarray(w), cfg), qjax.quantize(put(w, mesh, *spec), cfg)
    jax.tree.map(np.testing.assert_array_equal, q, expected)
    codes = q.scales.codes if double_quant else q.scales
    assert spec_of(q.packed) == spec_of(codes) == spec[::-1]
    if double_quant:
        assert q.scales.absmax.sharding.is_fully_replicated
    assert q.sharding.spec == P(*spec)
    decoded = q.dequantize()
    assert decoded.sharding.spec == P(*spec)
    np.testing.assert_array_equal(decoded, expected.dequantize())


# The specs of x [8, 4, 512] and the weight [512, 256], and that of their product.
CASES = {
    "outputs": (("d", None, None), (None, "t"), ("d", None, "t")),
    "contraction": (("d", None, "t"), ("t", None), ("d", None, None)),
    "both": ((None, None, None), ("d", "t"), (None, None, "t")),
    "rows over two axes": (("d", "t", None), (None, None), ("d", "t", None)),
    "an axis of both": (("d", None, None), (None, "d"), ("d", None, None)),
}


@pytest.mark.parametrize("case", CASES)
def test_products(mesh, w, rng, case):
    x_spec, w_spec, y_spec = CASES[case]
    q = qjax.quantize(put(w, mesh, *w_spec))
    x = rng.standard_normal((8, 4, 512), np.float32)
    decoded = np.float64(q.dequantize())
    expected = np.float64(x) @ decoded

    def loss(x, q):
        y = qjax.matmul(x, q)
        return (y**2).sum(), y

    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (_, y), dx = step(put(x, mesh, *x_spec), q)
    assert (spec_of(y), spec_of(dx)) == (y_spec, x_spec)
    # float32 sums of 512 and 256 products: 1e-5 of the largest.
    close = {"rtol": 0, "atol": 1e-5 * np.abs(expected).max()}
    np.testing.assert_allclose(y, expected, **close)
    expected = 2 * expected @ decoded.T
    np.testing.assert_allclose(dx, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("format", ["int4_asym", "nvfp4", "int8"])
def test_other_formats_split_along_the_contraction(mesh, w, rng, format):
    cfg = qjax.QuantConfig(format=format)
    q, expected = qjax.quantize(put(w, mesh, "t"), cfg), qjax.quantize(jnp.asarray(w), cfg)
    jax.tree.map(np.testing.assert_array_equal, q, expected)
    assert spec_of(q.packed) == (None, "t")
    x = rng.standard_normal((8, 512), np.float32)
    y = jax.jit(qjax.matmul)(put(x, mesh, "d", "t"), q)
    assert spec_of(y) == ("d", None)
    product = np.float64(x) @ np.float64(expected.dequantize())
    # Sums of 512 float32 products, of random signs: some sqrt(512) * 2**-24 of the largest.
    np.testing.assert_allclose(y, product, rtol=0, atol=1e-5 * np.abs(product).max())


def test_outside_jit_and_without_a_mesh_in_the_context(mesh, w, rng):
    q = qjax.quantize(put(w, mesh, None, "t"))
    x = rng.standard_normal((8, 512), np.float32)
    y = qjax.matmul(put(x, mesh, "d"), q)
    assert spec_of(y) == ("d", "t")
    expected = np.float64(x) @ np.float64(q.dequantize())
    # As above.
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("head_spec", [("t", None), (None, "t")])
def test_einsum_with_two_output_axes(mesh, rng, head_spec):
    # Sharded along the second of them, a device's rows are not consecutive ones of the weight.
    w, x = (rng.standard_normal(s, np.float32) for s in [(256, 8, 16), (4, 4, 256)])
    q = qjax.quantize(put(w, mesh, None, *head_spec))
    y = jax.jit(lambda x, q: qjax.einsum("btd,dnh->btnh", x, q))(put(x, mesh, "d"), q)
    assert spec_of(y) == ("d", None, *head_spec)
    expected = np.einsum("btd,dnh->btnh", np.float64(x), np.float64(q.dequantize()))
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_take_and_adapters(mesh, w, rng):
    table = qjax.quantize(put(w, mesh, None, "t"), contract_axes=(1,))
    ids = put(rng.integers(0, 512, (4, 2)), mesh, "d")
    rows = jax.jit(qjax.take)(table, ids)
    assert spec_of(rows) == ("d", None, "t")
    np.testing.assert_array_equal(rows, np.asarray(table.dequantize())[np.asarray(ids)])

    a, b = rng.standard_normal((256, 4), np.float32), rng.standard_normal((4, 512), np.float32)
    a_on, b_on = put(a, mesh, "t"), put(b, mesh, None, "t")
    close = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums of 256 and 4 products
    product = np.float64(a) @ np.float64(b)
    delta = lora_take(ids, put(a, mesh, "t"), put(b, mesh))
    assert spec_of(delta) == ("d", None, "t")
    np.testing.assert_allclose(delta, product.T[np.asarray(ids)], **close)
    weight = lora_weight(put(a, mesh, "d"), b_on, (0,))
    assert spec_of(weight) == ("d", "t")
    np.testing.assert_allclose(weight, product, **close)
    x = rng.standard_normal((4, 256), np.float32)
    y = lora_einsum("bd,dn->bn", put(x, mesh, "d", "t"), a_on, b_on, (0,))
    assert spec_of(y) == ("d", "t")
    expected = np.float64(x) @ product
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_shards_that_would_split_a_block(mesh, rng):
    def quantize(shape, *spec, **options):
        qjax.quantize(put(np.ones(shape, np.float32), mesh, *spec), name="mlp/kernel", **options)

    with pytest.raises(
        ValueError,
        match=r"mlp/kernel: axis 0 \(of 128\) is sharded over the mesh axis 't' \(4 devices\), "
        r"which would split blocks of 64: a shard has 32 of the K=128 weights of a row",
    ):
        quantize((128, 8), "t")
    with pytest.raises(ValueError, match=r"mesh axis 'd', 't' \(8 devices\), which would split"):
        quantize((256, 8), ("d", "t"))
    with pytest.raises(ValueError, match=r"axis 1 .* split blocks of 64: they run along the axes "):
        quantize((8, 64, 8), None, "t", contract_axes=(0, 1))
    with pytest.raises(ValueError, match=r"axis 1 .* they run over the ends of rows, since .*K=96"):
        quantize((96, 8), None, "t")


def test_partial_sums_travel_in_the_dtype_of_x(mesh):
    # As the float model's: bfloat16 takes half the bytes of a float32 sum.
    q = qjax.quantize(put(jnp.ones((512, 256), jnp.bfloat16), mesh, "t"))
    x = put(jnp.ones((8, 512), jnp.bfloat16), mesh, None, "t")
    jaxpr = str(jax.make_jaxpr(qjax.matmul)(x, q))
    assert re.search(r":bf16\[8,256\]\S* = psum", jaxpr), jaxpr
