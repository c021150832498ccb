"""LLM.int8() against bitsandbytes itself: its weights and its outputs."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file

import qjax

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "bnb" / "llm_int8.safetensors"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def weight(golden):
    return qjax.quantize(golden["float"].T, qjax.QuantConfig("int8", int8_threshold=6.0))


def test_a_float16_weight_has_bitsandbytes_codes(golden, weight):
    np.testing.assert_array_equal(weight.packed, golden["weight"])
    np.testing.assert_array_equal(weight.scales[:, 0], golden["SCB"])


@pytest.mark.parametrize("threshold", [6.0, 0.0])
@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_products_are_bitsandbytes_products(dtype, threshold, golden, weight):
    x = golden[f"x.{dtype}"]
    q = dataclasses.replace(weight, int8_threshold=threshold or float("inf"))
    y = np.asarray(jax.jit(qjax.matmul)(x, q), np.float64)
    one = np.asarray(qjax.matmul(x[2:3], q), np.float64)
    # Theirs is rounded before the outliers are added and after, ours after alone; their factor for
    # 1 / 127**2 is 6.200124e-05, and 1.8e-5 of the product too large.
    wide = np.asarray(x, np.float64)
    columns = (np.abs(wide) >= (threshold or np.inf)).any(axis=0)
    of_outliers = np.abs(wide[:, columns]) @ np.abs(np.asarray(q.dequantize(), np.float64)[columns])
    u = float(jnp.finfo(x.dtype).eps) / 2
    want = np.asarray(golden[f"y.{dtype}.{threshold}"], np.float64)
    bound = (3 * u + 2e-5) * (np.abs(want) + of_outliers)
    assert (np.abs(y - want) <= bound + 1e-6).all()
    # A row alone has outliers of its own alone.
    want, bound = np.asarray(golden[f"y_one.{dtype}.{threshold}"], np.float64), bound[2:3]
    assert (np.abs(one - want) <= bound + 1e-6).all()


def test_ties_between_codes_fall_as_in_bitsandbytes(golden, weight):
    q = dataclasses.replace(weight, int8_threshold=float("inf"))
    y = np.asarray(qjax.matmul(golden["x.ties"], q), np.float64)
    want = np.asarray(golden["y.ties"], np.float64)
    # Roundings to float16, and their factor as above: a code is 0.01 and more of a product.
    assert (np.abs(y - want) <= 1.1e-3 * np.abs(want) + 1e-5).all()


def test_large_activations_without_a_threshold_stay_finite(weight):
    q = dataclasses.replace(weight, int8_threshold=float("inf"))
    x = jnp.ones((2, 128)).at[0, 5].set(1e6)
    assert jnp.isfinite(qjax.matmul(x, q)).all()
