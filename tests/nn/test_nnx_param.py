"""QuantParam: what code that knows nothing of qjax, and NNX's states, see of a 4-bit weight."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.nnx import QuantLinear
from tests.nn.nnx_layers import F32


class TestQuantParam:
    def test_foreign_code_sees_the_decoded_array(self):
        kernel = QuantLinear(64, 8, config=F32, rngs=nnx.Rngs(0)).kernel
        w, x = kernel.q.dequantize(), jnp.ones((2, 64))
        assert kernel.shape == (64, 8)
        assert kernel.dtype == jnp.float32
        for got, want in [
            (kernel[...], w),
            (kernel[3], w[3]),
            (x @ kernel, x @ w),
            (kernel.T @ x.T, w.T @ x.T),
            (jnp.dot(x, kernel), x @ w),
            (kernel * 2.0, w * 2.0),
            (kernel.astype(jnp.bfloat16), w.astype(jnp.bfloat16)),
        ]:
            np.testing.assert_allclose(got, want, rtol=1e-5)  # sums of 64 in any order
        with pytest.warns(DeprecationWarning, match=r"\.value"):
            np.testing.assert_array_equal(kernel.value, w)

    def test_states_hold_the_qtensor(self):
        layer = QuantLinear(64, 8, config=F32, rngs=nnx.Rngs(0))
        pure = nnx.to_pure_dict(nnx.state(layer))
        assert isinstance(pure["kernel"], qjax.QTensor)
        assert nnx.state(layer, nnx.Param).keys() == {"bias"}

    def test_pure_dict_round_trip(self):
        layer = QuantLinear(64, 8, config=F32, rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(QuantLinear(64, 8, config=F32, rngs=nnx.Rngs(1)))
        nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.state(layer)))
        np.testing.assert_array_equal(nnx.merge(graphdef, state).kernel[...], layer.kernel[...])

    def test_refuses_item_assignment(self):
        layer = QuantLinear(64, 8, config=F32, rngs=nnx.Rngs(0))
        with pytest.raises(TypeError, match="cannot be assigned to by index"):
            layer.kernel[...] = jnp.ones((64, 8))

    def test_update_and_clone(self):
        layer = QuantLinear(64, 8, config=F32, rngs=nnx.Rngs(0))
        other = QuantLinear(64, 8, config=F32, rngs=nnx.Rngs(1))
        nnx.update(layer, nnx.state(other))
        np.testing.assert_array_equal(layer.kernel.q.packed, other.kernel.q.packed)
        np.testing.assert_array_equal(nnx.clone(layer).kernel[...], other.kernel[...])
