"""Formats beside NF4 and FP4, against ml_dtypes' numbers and float64 arithmetic."""

import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import qjax
from qjax.core import formats
from qjax.core.codebook import CODEBOOKS
from qjax.core.config import QuantConfig

NAMES = ["fp4_e2m1", "int4", "int4_asym", "mxfp4", "nvfp4", "int8", "fp8_e4m3", "fp8_e5m2"]
K, N = 128, 24
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "bnb"


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def blocks_of(w: np.ndarray, size: int) -> np.ndarray:
    """[K, N] -> [N, K / size, size], as blocks run."""
    return w.T.reshape(w.shape[1], -1, size)


def back(blocks: np.ndarray) -> np.ndarray:
    return blocks.reshape(blocks.shape[0], -1).T


def mxfp4(w):
    blocks = blocks_of(w, 32)
    # OCP Microscaling 1.0, section 6.3: the exponent of the largest, less that of 4 (2).
    exponent = np.floor(np.log2(np.abs(blocks).max(-1, keepdims=True))) - 2
    scaled = blocks / 2.0**exponent
    return back(scaled.astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * 2.0**exponent)


def nvfp4(w):
    blocks = blocks_of(w, 16)
    whole = np.float32(np.abs(w).max() / np.float32(6 * 448))
    largest = np.abs(blocks).max(-1, keepdims=True)
    scale = (largest / (6 * whole)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * whole
    return back((blocks / scale).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale)


def eight_bits(dtype, largest):
    def decoded(w):
        absmax = np.abs(w).max(0, keepdims=True)
        scaled = w * (np.float32(1) / absmax * np.float32(largest))
        codes = np.round(scaled) if dtype is np.int8 else scaled
        return codes.astype(dtype).astype(np.float32) * absmax / largest

    return decoded


def nearest(table, size):
    def decoded(w):
        blocks = blocks_of(w, size).astype(np.float64)
        absmax = np.abs(blocks).max(-1, keepdims=True)
        place = np.abs(blocks[..., None] / absmax[..., None] - table).argmin(-1)
        return back(table[place] * absmax)

    return decoded


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
REFERENCES = {
    "int4": nearest(np.arange(-7, 8) / 7, 64),
    "fp4_e2m1": nearest(np.array([*-E2M1[::-1], *E2M1]) / 6, 64),
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
    "int8": eight_bits(np.int8, 127),
    "fp8_e4m3": eight_bits(ml_dtypes.float8_e4m3fn, 448),
    "fp8_e5m2": eight_bits(ml_dtypes.float8_e5m2, 57344),
}  # fmt: skip


@pytest.mark.parametrize("name", REFERENCES)
def test_decoded_weights_are_those_of_the_format(name):
    w = normal(0, K, N)
    cfg = QuantConfig(format=name, double_quant=False)
    got = np.asarray(qjax.quantize(w, cfg).dequantize())
    want = REFERENCES[name](w)
    # Products of two float32 numbers may differ in the last bit.
    np.testing.assert_allclose(got, want, rtol=3e-7)


def test_zero_points_reach_both_ends_of_a_block():
    w = normal(1, K, N) + 1.5
    q = qjax.quantize(w, QuantConfig(format="int4_asym", block_size=32))
    blocks, got = blocks_of(w, 32), blocks_of(np.asarray(q.dequantize()), 32)
    step = (np.maximum(blocks.max(-1), 0) - np.minimum(blocks.min(-1), 0)) / 15
    # Half a step for the code, half for the zero point.
    assert (np.abs(got - blocks) <= step[..., None] * (1 + 1e-5)).all()
    assert np.abs(got - blocks).mean() < 0.3 * step.mean()


def test_int8_is_bitsandbytes_layout():
    data = load_file(GOLDEN / "linear8bit.safetensors")
    codes, absmax = data["weight"], data["SCB"]
    w = (codes.astype(np.float64) * absmax[:, None] / 127).T
    q = qjax.quantize(w.astype(np.float32), QuantConfig(format="int8"))
    np.testing.assert_array_equal(q.packed, codes)
    np.testing.assert_allclose(q.scales[:, 0], absmax, rtol=1e-6)  # w was rounded to float32


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_and_gradients_equal_those_of_the_decoded_weight(name, dtype):
    w = jnp.asarray(normal(2, K, N), dtype)
    x = jnp.asarray(normal(3, 5, K), dtype)
    g = jnp.asarray(normal(4, 5, N), dtype)
    q = qjax.quantize(w, QuantConfig(format=name))
    y, vjp = jax.vjp(lambda x: qjax.matmul(x, q), x)
    exact = np.asarray(q.dequantize(jnp.float32), np.float64)
    # Higham 2002, section 3.1: K roundings of float32 sums, and three to the dtype.
    u = K * 2**-24 + {"float32": 0, "bfloat16": 3 * 2**-9}[jnp.dtype(dtype).name]
    for got, a, b in ((y, x, exact), (vjp(g)[0], g, exact.T)):
        a = np.asarray(a, np.float64)
        assert (np.abs(np.asarray(got, np.float64) - a @ b) <= u * np.abs(a) @ np.abs(b)).all()


@pytest.mark.parametrize("name", NAMES)
def test_stacked_layers_and_rows_of_a_table(name):
    w = normal(5, 3, N, K)
    q = qjax.quantize(w, QuantConfig(format=name), contract_axes=(1,), batch_ndim=1)
    one = qjax.quantize(w[1], QuantConfig(format=name), contract_axes=(1,))
    assert q.shape == (3, N, K) and q.dequantize().shape == (3, N, K)
    # The mean of double quantization is summed in another order.
    np.testing.assert_allclose(q.dequantize()[1], one.dequantize(), rtol=1e-6)
    x = normal(6, 3, 2, K)
    y = qjax.matmul(x, q)
    np.testing.assert_allclose(y[1], qjax.matmul(x[1], one), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        qjax.take(one, jnp.array([4, 0])), np.asarray(one.dequantize())[[4, 0]]
    )


def test_llm_int8_keeps_the_columns_of_outliers_in_floating_point():
    w, x = normal(7, K, N), normal(8, 6, K).astype(np.float16).astype(np.float32)
    x[2, 17], x[4, 90], x[0, 3] = 9.0, -60.0, 6.0
    q = qjax.quantize(w, QuantConfig(format="int8", int8_threshold=6.0))
    y = np.asarray(jax.jit(qjax.matmul)(x, q))
    # Dettmers et al. 2022, section 3.2, in float64.
    outliers = np.unique(np.argwhere(np.abs(x) >= 6.0)[:, 1])
    assert list(outliers) == [3, 17, 90]
    decoded = np.asarray(q.dequantize(), np.float64)
    quiet = np.where(np.abs(x) >= 6.0, 0, x).astype(np.float64)
    step = np.abs(quiet).max(1, keepdims=True) / 127
    eighth = np.round(quiet / step)
    eighth[:, outliers] = 0
    want = (eighth * step) @ decoded + x[:, outliers].astype(np.float64) @ decoded[outliers]
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)  # float32 sums of 128 terms
    # The gradient knows nothing of rounding: it is that of the weight alone.
    gradient = jax.grad(lambda x: qjax.matmul(x, q).sum())(jnp.asarray(x))
    np.testing.assert_allclose(gradient, np.tile(decoded.sum(1), (6, 1)), rtol=1e-4, atol=1e-4)


@pytest.fixture
def own_format():
    values = np.tanh(np.linspace(-2, 2, 16)) / np.tanh(2)
    qjax.register_format("tanh4", values)
    yield np.float32(values)
    for table in (formats._FORMATS, CODEBOOKS):
        table.pop("tanh4", None)


def test_a_table_of_ones_own(own_format, tmp_path):
    w = normal(9, K, N)
    q = qjax.quantize(w, QuantConfig(format="tanh4", double_quant=False))
    want = nearest(own_format.astype(np.float64), 64)(w)
    np.testing.assert_allclose(q.dequantize(), want, rtol=3e-7)
    qjax.save(tmp_path / "own", {"w": q})
    for table in (formats._FORMATS, CODEBOOKS):  # as in a process that never heard of it
        table.pop("tanh4")
    loaded = qjax.load(tmp_path / "own")["w"]
    np.testing.assert_array_equal(loaded.dequantize(), q.dequantize())


@pytest.mark.parametrize(
    "values, message",
    [
        (np.linspace(-1, 1, 15), "16 increasing finite values"),
        (np.linspace(1, -1, 16), "16 increasing finite values"),
        ([*np.linspace(-1, 0.5, 15), np.nan], "16 increasing finite values"),
        (np.linspace(-2, 2, 16), "largest magnitude of a codebook is 1, got 2"),
    ],
)
def test_tables_that_are_none(values, message):
    with pytest.raises(ValueError, match=f"bad4: .*{message}"):
        qjax.register_format("bad4", values)
    with pytest.raises(ValueError, match="format must be one of"):
        QuantConfig(format="bad4")


def test_a_name_stands_for_one_table():
    with pytest.raises(ValueError, match="'int8' is taken"):
        qjax.register_format("int8", np.linspace(-1, 1, 16))


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load(name, tmp_path):
    threshold = 6.0 if name == "int8" else None
    cfg = QuantConfig(format=name, int8_threshold=threshold)
    q = qjax.quantize(normal(10, 2, K, N), cfg, batch_ndim=1)
    qjax.save(tmp_path / "w", {"w": q})
    loaded = qjax.load(tmp_path / "w")["w"]
    assert jax.tree.structure(loaded) == jax.tree.structure(q)
    jax.tree.map(np.testing.assert_array_equal, loaded, q)


@pytest.mark.parametrize("name, size", [("mxfp4", 48), ("nvfp4", 24), ("int4_asym", 80)])
def test_blocks_that_do_not_fit_are_refused(name, size):
    with pytest.raises(ValueError, match=f"fc/kernel: block_size=.* must divide K={size}"):
        qjax.quantize(jnp.ones((size, 4)), QuantConfig(format=name), name="fc/kernel")


@pytest.mark.parametrize("name", NAMES)
def test_zero_weights_stay_zero(name):
    q = qjax.quantize(jnp.zeros((K, 2)), QuantConfig(format=name))
    np.testing.assert_array_equal(q.dequantize(), np.zeros((K, 2)))


@pytest.mark.parametrize("name", NAMES)
def test_bytes_and_bits(name):
    q = qjax.quantize(normal(11, K, 64), QuantConfig(format=name))
    scale_bits = {"fp4_e2m1": 8 / 64, "int4": 8 / 64, "int4_asym": 40 / 64, "mxfp4": 8 / 32,
                  "nvfp4": 8 / 16}.get(name, 32 / K)  # fmt: skip
    code_bits = 8 if "8" in name else 4
    # The second level of double quantization: 36 bytes for the whole weight.
    assert code_bits + scale_bits <= q.bits_per_param <= code_bits + scale_bits + 36 * 8 / q.size
