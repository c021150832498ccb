"""Stacks of expert weights [E, in, out] on a mesh of 8 devices, sharded over experts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.core.decode_rows import partitioned
from qjax.ops.ragged import ragged_dot
from tests.hlo import collectives

E, K, N, ROWS = 8, 256, 128, 16
EXPERTS = P("e", None, None)


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return jax.make_mesh((4, 2), ("e", "d"), axis_types=(request.param,) * 2)


@pytest.fixture
def auto():
    return jax.make_mesh((4, 2), ("e", "d"), axis_types=(AxisType.Auto,) * 2)


def on(mesh, spec, a):
    return jax.device_put(a, NamedSharding(mesh, spec))


def quantized(w, mesh, spec):
    return qjax.quantize(on(mesh, spec, w), batch_ndim=1)


def loss(x, w):
    equation = "emk,ekn->emn"
    y = qjax.einsum(equation, x, w) if isinstance(w, qjax.QTensor) else jnp.einsum(equation, x, w)
    return (y**2).sum(), y


# x's spec and the weight's.
CASES = {
    "experts": (EXPERTS, EXPERTS),
    "tokens that come to the experts": (P(None, "e", None), EXPERTS),
    "experts and their columns": (P("e", None, None), P("e", None, "d")),
    "experts and their rows": (P("e", None, "d"), P("e", "d", None)),
}


@pytest.mark.parametrize("case", CASES)
def test_einsum_and_its_gradient(mesh, auto, rng, case):
    x_spec, w_spec = CASES[case]
    w, x = (rng.standard_normal(s, np.float32) for s in [(E, K, N), (E, ROWS, K)])
    q = quantized(w, mesh, w_spec)
    one_device = qjax.quantize(jnp.asarray(w), batch_ndim=1)
    jax.tree.map(np.testing.assert_array_equal, q, one_device)

    def compiled(mesh, w):
        out = (None, None), NamedSharding(mesh, x_spec)
        step = jax.jit(jax.value_and_grad(loss, has_aux=True), out_shardings=out)
        with jax.set_mesh(mesh):
            return step.lower(on(mesh, x_spec, x), w).compile()

    step = compiled(mesh, q)
    (_, y), dx = step(on(mesh, x_spec, x), q)
    assert y.sharding.spec[0] == "e"
    decoded = np.float64(one_device.dequantize())
    expected = np.einsum("emk,ekn->emn", np.float64(x), decoded)
    # float32 sums of 256 and 128 products: 1e-5 of the largest.
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    expected = 2 * np.einsum("emn,ekn->emk", expected, decoded)
    np.testing.assert_allclose(dx, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    floats = collectives(compiled(auto, on(auto, w_spec, w)))
    ours = collectives(step)
    # By bytes in all: where XLA gathers tokens for the float weights, ours go by all-to-all.
    assert sum(ours.values()) <= sum(floats.values()), (ours, floats)
    assert not re.search(r"u8\[[^=\n]* all-gather", step.as_text())


def test_ragged_products(mesh, rng):
    w, x = (rng.standard_normal(s, np.float32) for s in [(E, K, N), (20, K)])
    sizes = np.array([3, 0, 5, 2, 1, 4, 0, 5], np.int32)
    q = quantized(w, mesh, EXPERTS)
    with jax.set_mesh(mesh):
        y = jax.jit(ragged_dot)(on(mesh, P(), x), q, on(mesh, P(), sizes))
    decoded = np.float64(qjax.quantize(jnp.asarray(w), batch_ndim=1).dequantize())
    expected = np.einsum("mk,mkn->mn", np.float64(x), np.repeat(decoded, sizes, axis=0))
    # float32 sums of 256 products: 1e-5 of the largest.
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "block_size, spec",
    [
        (64, EXPERTS),
        (64, P("d", "e", None)),
        (64, P(None, None, "e")),
        (256, P("d", None, "e")),  # rows of one block
    ],
)
def test_the_rule_for_decoding_in_a_kernel(auto, rng, block_size, spec):
    # Here through XLA, in place of the kernel that the rule is for: numbers, and nothing sent.
    w = rng.standard_normal((E, K, N), np.float32)
    cfg = qjax.QuantConfig(block_size=block_size, double_quant=False)
    q = qjax.quantize(on(auto, spec, w), cfg, batch_ndim=1)
    decode = partitioned(block_size, jnp.dtype(jnp.float32), "xla")
    decode = jax.jit(jax.vmap(decode, in_axes=(0, 0, None)))
    compiled = decode.lower(q.packed, q.scales, q.codebook).compile()
    assert collectives(compiled) == {}
    got = compiled(q.packed, q.scales, q.codebook)
    np.testing.assert_array_equal(np.swapaxes(got, 1, 2), q.dequantize())
    one = jax.jit(partitioned(block_size, jnp.dtype(jnp.float32), "xla"))
    np.testing.assert_array_equal(one(q.packed[0], q.scales[0], q.codebook), got[0])
