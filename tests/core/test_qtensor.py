"""QTensor as a pytree: shapes stay true whatever JAX does to the leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import qjax
from tests.pallas_kernels.problems import lower

CONFIGS = [qjax.QuantConfig(double_quant=False), qjax.QuantConfig()]


@pytest.fixture(params=CONFIGS, ids=["plain", "double"])
def stack(request, rng):
    w = jnp.asarray(rng.standard_normal((3, 128, 4)), jnp.bfloat16)
    return qjax.quantize(w, request.param, batch_ndim=1)


def test_indexing_leaves(stack):
    one = jax.tree.map(lambda a: a[1], stack)
    assert (stack.shape, one.shape, one.size) == ((3, 128, 4), (128, 4), 512)
    one.check()


def test_stacking(stack):
    slices = [jax.tree.map(lambda a, i=i: a[i], stack) for i in range(3)]
    again = jax.tree.map(lambda *leaves: jnp.stack(leaves), *slices)
    assert again.shape == stack.shape
    np.testing.assert_array_equal(again.dequantize(), stack.dequantize())


def test_vmap_and_scan_see_one_slice(stack):
    def shape_of(q):
        assert q.shape == (128, 4)
        return q.dequantize()

    np.testing.assert_array_equal(jax.vmap(shape_of)(stack), stack.dequantize())
    _, scanned = jax.lax.scan(lambda c, q: (c, shape_of(q)), 0, stack)
    np.testing.assert_array_equal(scanned, stack.dequantize())


def test_rebuilding_checks_nothing(stack):
    for leaf in (None, True, PartitionSpec(), object()):
        rebuilt = jax.tree.map(lambda _, leaf=leaf: leaf, stack)
        assert isinstance(rebuilt, qjax.QTensor)
        assert "QTensor" in repr(rebuilt)


def test_paths_name_the_leaves(stack):
    paths = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(stack)}
    assert ".packed" in paths
    assert paths > {".packed"}


def test_bytes_are_counted_truly(rng):
    w = jnp.asarray(rng.standard_normal((1024, 16)), jnp.float32)
    plain, double = (qjax.quantize(w, cfg) for cfg in CONFIGS)
    # 4 bits each and a float32 for 64; then 8 bits for 64, a float32 for 256 * 64 and an offset.
    assert plain.nbytes == 1024 * 16 // 2 + 4 * 256
    assert double.nbytes == 1024 * 16 // 2 + 256 + 4 + 4
    assert plain.bits_per_param == 4.5
    assert double.bits_per_param == pytest.approx(4.129, abs=1e-3)
    assert repr(plain) == ("QTensor([1024, 16] float32, NF4 b64, 0.00922 MB, 4.500 bits/param)")


def change(q, **fields):
    import dataclasses

    return dataclasses.replace(q, **fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"packed": jnp.zeros((4, 63), jnp.uint8)}, r"layer: packed must be uint8\[4, 64\]"),
        ({"packed": jnp.zeros((4, 64), jnp.int8)}, r"packed must be uint8.*got int8"),
        ({"scales": jnp.zeros((4, 3))}, r"scales must be float32\[4, 2\], got float32\[4, 3\]"),
        ({"scales": jnp.zeros((4, 2), jnp.bfloat16)}, "scales must be float32.*got bfloat16"),
        ({"layout": "flat"}, "layout='flat' does not fit K=128 with block_size=64"),
        ({"block_size": 48}, "layout='rows' does not fit K=128 with block_size=48"),
        ({"format": "int3"}, "format must be one of"),
    ],
)
def test_check_refuses_what_does_not_fit(fields, message):
    q = qjax.quantize(jnp.ones((128, 4)), CONFIGS[0])
    q.check()
    with pytest.raises(ValueError, match=message):
        change(q, **fields).check("layer")


@pytest.mark.parametrize("layers, one_by_one", [(16, False), (17, True), (33, False)])
def test_a_stack_that_kernels_do_not_reach_under_vmap_is_decoded_slice_by_slice(layers, one_by_one):
    """Triton counts up to 2**32 bytes in 32 bits, signed; a layer here has 2**27."""
    w = jax.ShapeDtypeStruct((layers, 2**16, 4096), jnp.bfloat16)
    q = jax.eval_shape(lambda w: qjax.quantize(w, batch_ndim=1), w)
    assert ("scan" in str(jax.make_jaxpr(lambda q: q.dequantize())(q))) == one_by_one


def test_decoded_slice_by_slice_a_stack_is_the_same(stack, monkeypatch):
    want = stack.dequantize()
    monkeypatch.setattr(qjax.core.qtensor, "out_of_reach", lambda *_: "too far")
    np.testing.assert_array_equal(stack.dequantize(), want)


@pytest.mark.parametrize("cfg", CONFIGS, ids=["plain", "double"])
def test_scales_have_a_gradient_where_kernels_decode_too(cfg, rng, monkeypatch):
    w = jnp.asarray(rng.standard_normal((128, 6)), jnp.float32)
    q = qjax.quantize(w, cfg)
    g = jnp.asarray(rng.standard_normal(w.shape), jnp.float32)
    grad = jax.value_and_grad(lambda q: jnp.vdot(q.dequantize(), g), allow_int=True)
    # A weight is code * scale: what its code is times g, summed over the block. Of the scales
    # of double quantization the sum of all is that of the offset, which is added to each.
    codes = np.stack([q.packed >> 4, q.packed & 15], -1).reshape(6, 2, 64)
    of_scales = (np.float64(q.codebook)[codes] * np.float64(g.T).reshape(6, 2, 64)).sum(-1)
    got, want = grad(q)[1].scales, of_scales
    if cfg.double_quant:
        got, want = got.offset, of_scales.sum()
    # float32 sums of 64, and of 12 blocks.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert "dequantize_4bit_triton" in lower(grad, q)
