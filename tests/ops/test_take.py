"""take against jnp.take of the decoded table: bit-equal, since both decode the same way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("contract, width", [((1,), 128), ((0,), 128), ((1,), 100)])
def test_rows_are_those_of_the_decoded_table(rng, contract, width, double_quant):
    # 640 rows of 128: 1280 scales, so that rows lie in five groups of the second level.
    w = jnp.asarray(rng.standard_normal((640, width)), jnp.bfloat16)
    q = qjax.quantize(w, qjax.QuantConfig(double_quant=double_quant), contract)
    ids = jnp.array([[0, 639, 3], [-1, 640, -641]])
    y = jax.jit(qjax.take)(q, ids)
    assert (y.shape, y.dtype) == ((2, 3, width), jnp.bfloat16)
    y = np.asarray(y, np.float32)
    expected = np.asarray(jnp.take(q.dequantize(), ids, axis=0), np.float32)
    np.testing.assert_array_equal(y, expected)
    assert np.isnan(y[1, 1:]).all()


def test_only_the_rows_asked_for_are_decoded(rng):
    q = qjax.quantize(jnp.ones((4096, 256)), contract_axes=(1,))
    compiled = jax.jit(qjax.take).lower(q, jnp.zeros((4,), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 256 // 8


@pytest.mark.parametrize(
    "q, ids, error, message",
    [
        (qjax.QuantConfig(), jnp.zeros(1, jnp.int32), TypeError, "q must be a QTensor"),
        (None, jnp.zeros(1), TypeError, "ids must be integers, got float32"),
        (64, jnp.zeros(1, jnp.int32), ValueError, r"q must be a table \[V, D\]"),
    ],
)
def test_misuse(q, ids, error, message):
    if q is None:
        q = qjax.quantize(jnp.ones((4, 64)), contract_axes=1)
    elif q == 64:
        q = qjax.quantize(jnp.ones((64,)))
    with pytest.raises(error, match=message):
        qjax.take(q, ids)
