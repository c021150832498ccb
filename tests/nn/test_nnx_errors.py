"""What the NNX layers refuse, and in which words."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from qjax.nnx import QuantEinsum, QuantLinear, QuantLinearGeneral
from tests.nn.nnx_layers import F32


class TestRefusals:
    def test_own_product(self):
        with pytest.raises(ValueError, match="QuantLinear has its own product and takes no dot_g"):
            QuantLinear(64, 8, dot_general=jax.lax.dot_general, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="takes no einsum_op"):
            QuantEinsum("bk,kn->bn", (64, 8), einsum_op=jnp.einsum, rngs=nnx.Rngs(0))

    def test_equation_without_a_sum(self):
        with pytest.raises(ValueError, match="sums over no axis of the kernel"):
            QuantEinsum("bk,kn->bkn", (64, 8), rngs=nnx.Rngs(0))

    def test_wrong_class(self):
        with pytest.raises(TypeError, match=r"needs an nnx\.Linear, got Embed"):
            QuantLinear.from_float(nnx.Embed(4, 64, rngs=nnx.Rngs(0)))

    def test_not_finite_names_the_weight(self):
        layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
        layer.kernel[...] = jnp.full((64, 8), jnp.nan)
        with pytest.raises(ValueError, match="decoder/out/kernel holds NaN or inf"):
            QuantLinear.from_float(layer, name="decoder/out/kernel")

    def test_transposed_stack(self):
        layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
        layer.kernel = nnx.Param(jnp.ones((64, 3, 8)))
        with pytest.raises(ValueError, match=r"shape \(64, 3, 8\) is not \[64, 8\] behind stacked"):
            QuantLinear.from_float(layer)

    def test_general_with_wrong_axes(self):
        layer = QuantLinearGeneral((4, 16), 8, axis=(-2, -1), config=F32, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"must be in_features=\(4, 16\)"):
            layer(jnp.ones((2, 16, 4)))
