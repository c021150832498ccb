"""quantize and dequantize: layouts, axes, errors, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core.codebook import CODEBOOKS
from tests.pallas_kernels.problems import lower


def nearest(blocks, table):
    """Quantize float64 [..., block]: each value to the nearest table entry times absmax."""
    absmax = np.abs(blocks).max(-1, keepdims=True)
    scaled = blocks / np.where(absmax == 0, 1, absmax)
    return table[np.abs(scaled[..., None] - table).argmin(-1)] * absmax


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_values_are_the_nearest_ones(rng, format, block_size):
    w = rng.standard_normal((4096, 3)).astype(np.float32)
    q = qjax.quantize(jnp.asarray(w), qjax.QuantConfig(format, block_size, double_quant=False))
    table = CODEBOOKS[format].astype(np.float64)
    expected = nearest(w.T.astype(np.float64).reshape(3, -1, block_size), table).reshape(3, -1).T
    # float32 rounding of the scaled value can choose the other neighbour at a tie: none is here.
    np.testing.assert_allclose(q.dequantize(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "shape, contract, packed",
    [
        ((64, 6), (0,), (6, 32)),
        ((6, 64), (1,), (6, 32)),
        ((64, 2, 3), (0,), (2, 3, 32)),
        ((2, 32, 5), (0, 1), (5, 32)),
        ((2, 5, 32), (0, 2), (5, 32)),
        ((64,), (0,), (32,)),
    ],
)
def test_rows_layout_is_the_transposed_matrix(rng, shape, contract, packed):
    w = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    q = qjax.quantize(w, contract_axes=contract)
    q.check()
    assert (q.layout, q.packed.shape, q.shape) == ("rows", packed, shape)
    out = [i for i in range(len(shape)) if i not in contract]
    matrix = jnp.transpose(w, (*out, *contract)).reshape(-1, 64)
    same = qjax.quantize(matrix, contract_axes=(1,))
    np.testing.assert_array_equal(q.packed.reshape(-1, 32), same.packed)
    back = np.transpose(q.dequantize(), (*out, *contract)).reshape(-1, 64)
    np.testing.assert_array_equal(back, same.dequantize())


def test_a_block_that_does_not_divide_straddles_rows(rng):
    w = jnp.asarray(rng.standard_normal((100, 7)), jnp.float32)
    q = qjax.quantize(w, qjax.QuantConfig(double_quant=False))
    q.check()
    assert (q.layout, q.packed.shape, q.scales.shape) == ("flat", (350,), (11,))
    line = w.T.reshape(-1)
    padded = np.pad(line, (0, 4)).reshape(11, 64).astype(np.float64)
    expected = nearest(padded, CODEBOOKS["nf4"].astype(np.float64)).reshape(-1)[:700]
    # One product in float32: a rounding of 2^-24.
    np.testing.assert_allclose(q.dequantize().T.reshape(-1), expected, rtol=1e-6)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(3, 64, 5), (2, 3, 100, 7)])
def test_stacked_weights_are_their_slices(rng, shape, double_quant):
    w = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    cfg = qjax.QuantConfig(double_quant=double_quant)
    batch = len(shape) - 2
    q = qjax.quantize(w, cfg, batch_ndim=batch)
    q.check()
    assert q.shape == shape
    for index in np.ndindex(shape[:batch]):
        one = qjax.quantize(w[index], cfg)
        jax.tree.map(
            np.testing.assert_array_equal, jax.tree.map(lambda a, index=index: a[index], q), one
        )
        np.testing.assert_array_equal(q.dequantize()[index], one.dequantize())


def test_a_kernel_gets_whole_blocks_alone():
    kernel = "quantize_4bit_triton"
    assert kernel in lower(qjax.quantize, jax.ShapeDtypeStruct((70,), jnp.float32))
    assert kernel not in lower(qjax.quantize, jax.ShapeDtypeStruct((60,), jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtype_is_kept(dtype):
    q = qjax.quantize(jnp.ones((64, 2), dtype))
    assert q.dtype == dtype == q.dequantize().dtype
    assert q.dequantize(jnp.float32).dtype == jnp.float32
    np.testing.assert_array_equal(q.dequantize(), np.ones((64, 2)))


def test_jit_gives_the_same_bits(rng):
    w = jnp.asarray(rng.standard_normal((128, 4)), jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(qjax.quantize)(w), qjax.quantize(w))


@pytest.mark.parametrize("shape", [(8192, 8192)])
def test_encoding_needs_less_than_three_times_the_weight(shape):
    # Compiled, not run: the compiler's own account of temporaries. No 16-wide ones.
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    memory = jax.jit(qjax.quantize).lower(w).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 3 * 4 * shape[0] * shape[1]


@pytest.mark.parametrize(
    "w, kwargs, error, message",
    [
        (
            jnp.ones((64, 2), jnp.int32),
            {},
            TypeError,
            "layer/kernel must be a floating array.*int32",
        ),
        (jnp.ones((64, 2), jnp.complex64), {}, TypeError, "must be a floating array.*complex64"),
        ([1.0], {}, TypeError, "must be a floating array, got <class 'list'>"),
        (jnp.ones((64, 2)), {"cfg": "fp4"}, TypeError, "cfg must be a QuantConfig, got 'fp4'"),
        (jnp.zeros((0, 2)), {}, ValueError, r"must not be empty, got shape \(0, 2\)"),
        (jnp.full((64, 2), jnp.nan), {}, ValueError, "layer/kernel holds NaN or inf"),
        (jnp.full((64, 2), jnp.inf), {}, ValueError, "layer/kernel holds NaN or inf"),
        (jnp.full((100, 1), jnp.inf), {}, ValueError, "layer/kernel holds NaN or inf"),
        (jnp.ones((64, 2)), {"contract_axes": (2,)}, ValueError, r"contract_axes=\(2,\)"),
        (jnp.ones((64, 2)), {"contract_axes": (0, -2)}, ValueError, "distinct axes of a rank-2"),
        (jnp.ones((64, 2)), {"contract_axes": ()}, ValueError, r"contract_axes=\(\)"),
        (jnp.ones((64, 2)), {"batch_ndim": 2}, ValueError, "batch_ndim=2 must be below its rank 2"),
    ],
)
def test_misuse(w, kwargs, error, message):
    with pytest.raises(error, match=message):
        qjax.quantize(w, name="layer/kernel", **kwargs)


def test_nonfinite_weights_pass_when_asked():
    q = qjax.quantize(jnp.full((64, 1), jnp.nan), check_finite=False)
    assert np.isnan(q.dequantize()).all()
