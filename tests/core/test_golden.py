"""Equality with bitsandbytes on its own data: the 154 cases of tests/golden/bnb."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax.core.codebook import CODEBOOKS
from qjax.core.double_quant import DoubleQuant, dynamic_table, quantize_scales
from tests.conftest import TESTS

FOLDER = TESTS / "golden" / "bnb"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())
PLAIN = sorted(name for name, case in MANIFEST.items() if not case["nested"])
NESTED = sorted(name for name, case in MANIFEST.items() if case["nested"])
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(scope="module")
def cases():
    with np.load(FOLDER / "cases.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def tables():
    with np.load(FOLDER / "tables.npz") as archive:
        return dict(archive)


def weight(cases, name):
    """The case as the line of numbers that bitsandbytes sees."""
    return jnp.asarray(cases[f"{name}/input"].view(DTYPES[MANIFEST[name]["dtype"]]).reshape(-1))


def config(name):
    case = MANIFEST[name]
    return qjax.QuantConfig(case["quant_type"], case["blocksize"], case["nested"])


def assert_same_bits(actual, expected):
    """Equal bits, where any NaN equals any other: IEEE leaves their payload open."""
    actual, expected = np.asarray(actual).reshape(-1), np.asarray(expected).reshape(-1)
    assert actual.dtype == expected.dtype
    integer = np.dtype(f"u{actual.dtype.itemsize}")
    nan = np.isnan(actual.astype(np.float32)) & np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(actual.view(integer)[~nan], expected.view(integer)[~nan])


def test_there_are_154_cases():
    assert (len(PLAIN), len(NESTED)) == (142, 12)


@pytest.mark.parametrize("name", PLAIN)
def test_encode_and_decode_are_bit_equal(cases, name):
    q = qjax.quantize(weight(cases, name), config(name), check_finite=False)
    np.testing.assert_array_equal(np.asarray(q.packed).reshape(-1), cases[f"{name}/packed"])
    assert_same_bits(q.scales, cases[f"{name}/absmax"])
    dtype = DTYPES[MANIFEST[name]["dtype"]]
    assert_same_bits(q.dequantize(), cases[f"{name}/dequant"].view(dtype))


@pytest.mark.parametrize("name", NESTED)
def test_nested_decode_is_bit_equal(cases, name):
    q = qjax.quantize(weight(cases, name), config(name))
    stored = DoubleQuant(
        jnp.asarray(cases[f"{name}/absmax"]).reshape(q.scales.codes.shape),
        jnp.asarray(cases[f"{name}/nested_absmax"]),
        jnp.asarray(cases[f"{name}/nested_offset"]).reshape(()),
    )
    packed = jnp.asarray(cases[f"{name}/packed"]).reshape(q.packed.shape)
    stored = dataclasses.replace(q, packed=packed, scales=stored)
    stored.check(name)
    expected = cases[f"{name}/dequant"].view(DTYPES[MANIFEST[name]["dtype"]])
    assert_same_bits(stored.dequantize(), expected)
    assert_same_bits(jax.jit(lambda q: q.dequantize())(stored), expected)


def test_nested_encode_differs_in_under_one_code_in_a_thousand(cases):
    # The mean's last bit depends on the order of its sum, so the codes are not bit-defined.
    different = total = 0
    for name in NESTED:
        q = qjax.quantize(weight(cases, name), config(name))
        np.testing.assert_array_equal(np.asarray(q.packed).reshape(-1), cases[f"{name}/packed"])
        codes = np.asarray(q.scales.codes, np.int32).reshape(-1)
        gap = np.abs(codes - cases[f"{name}/absmax"].astype(np.int32))
        assert gap.max() <= 1
        different, total = different + np.count_nonzero(gap), total + gap.size
        # One unit in the last place of the offset, and what it moves the group's absmax by.
        ulp = np.spacing(cases[f"{name}/nested_offset"])
        np.testing.assert_allclose(q.scales.offset, cases[f"{name}/nested_offset"], 0, ulp)
        np.testing.assert_allclose(q.scales.absmax, cases[f"{name}/nested_absmax"], 0, 2 * ulp)
    assert different < total / 1000


def test_nested_encode_of_scales_with_bitsandbytes_own_mean(cases):
    compared = 0
    for name in NESTED:
        scales = cases[f"{name}/absmax_prenest"]
        q = quantize_scales(jnp.asarray(scales))
        if float(q.offset) == float(cases[f"{name}/nested_offset"]):
            np.testing.assert_array_equal(q.codes, cases[f"{name}/absmax"])
            np.testing.assert_array_equal(q.absmax, cases[f"{name}/nested_absmax"])
            compared += 1
    assert compared >= len(NESTED) - 1  # one mean differs in its last bit


def test_tables(tables):
    np.testing.assert_array_equal(CODEBOOKS["nf4"], tables["nf4"])
    np.testing.assert_array_equal(CODEBOOKS["fp4"], tables["fp4"])
    np.testing.assert_array_equal(dynamic_table(), tables["dynamic8_signed"])
