"""The matmul on a mesh of 8 devices: same numbers, and no collective beyond the float model's."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.core.double_quant import DoubleQuant

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("d", "t"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def shard(q, mesh, spec):
    """Place packed and scales by `spec` [rows, blocks], and the second level everywhere."""

    def put(a, spec):
        return jax.device_put(a, NamedSharding(mesh, spec))

    scales = q.scales
    if isinstance(scales, DoubleQuant):
        scales = DoubleQuant(
            put(scales.codes, spec), put(scales.absmax, P()), put(scales.offset, P())
        )
    else:
        scales = put(scales, spec)
    return dataclasses.replace(q, packed=put(q.packed, spec), scales=scales)


def collectives(compiled) -> dict[str, int]:
    text = compiled.as_text()
    counts = {name: len(re.findall(rf"= \S+ {name}(-start)?\(", text)) for name in COLLECTIVES}
    return {name: count for name, count in counts.items() if count}


def loss(x, q):
    return (qjax.matmul(x, q) ** 2).sum()


# Weight [512, 256] quantized along 512; the spec is that of its rows [256] and blocks [8].
# (x's spec, the weight's, collectives forward, and those of the gradient with respect to x.)
CASES = {
    "replicated": (P("d"), P(), {}, {}),
    "outputs": (P("d"), P("t"), {}, {"all-reduce": 1}),
    "outputs over two axes": (P(), P(("d", "t")), {}, {"all-reduce": 1}),
    "contraction": (P("d", "t"), P(None, "t"), {"all-reduce": 1}, {"all-reduce": 1}),
    "both": (P(None, "t"), P("d", "t"), {"all-reduce": 1}, {"all-reduce": 2}),
}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_collectives_and_numbers(rng, mesh, case, double_quant):
    x_spec, w_spec, forward, backward = CASES[case]
    cfg = qjax.QuantConfig(double_quant=double_quant)
    q = qjax.quantize(jnp.asarray(rng.standard_normal((512, 256)), jnp.float32), cfg)
    x = jnp.asarray(rng.standard_normal((8, 512)), jnp.float32)
    w = np.float64(q.dequantize())
    expected = {"y": np.float64(x) @ w}
    expected["dx"] = 2 * expected["y"] @ w.T
    operands = jax.device_put(x, NamedSharding(mesh, x_spec)), shard(q, mesh, w_spec)
    for function, name, counts in [(qjax.matmul, "y", forward), (jax.grad(loss), "dx", backward)]:
        compiled = jax.jit(function).lower(*operands).compile()
        assert collectives(compiled) == counts
        # float32 sums of 512 products, in another order on each mesh: 1e-5 of the largest.
        atol = 1e-5 * np.abs(expected[name]).max()
        np.testing.assert_allclose(compiled(*operands), expected[name], rtol=0, atol=atol)


@pytest.mark.parametrize("rows, gathered", [(2048, "u8"), (8, "f32")])
def test_on_a_shared_axis_the_smaller_operand_is_gathered(mesh, rows, gathered):
    q = shard(qjax.quantize(jnp.ones((512, 256))), mesh, P("d"))
    x = jax.device_put(jnp.ones((rows, 512)), NamedSharding(mesh, P("d")))
    text = jax.jit(qjax.matmul).lower(x, q).compile().as_text()
    kinds = set(re.findall(r"= \(?(\w+)\[\S* all-gather(?:-start)?\(", text))
    assert kinds == {gathered}


def test_vmap_over_weights_and_rows(rng):
    stack = qjax.quantize(jnp.asarray(rng.standard_normal((3, 64, 8)), jnp.float32), batch_ndim=1)
    x = jnp.asarray(rng.standard_normal((3, 5, 64)), jnp.float32)
    y = jax.jit(jax.vmap(jax.vmap(qjax.matmul, in_axes=(0, None))))(x, stack)
    expected = np.einsum("bmk,bkn->bmn", np.float64(x), np.float64(stack.dequantize()))
    # Sums of 64 float32 products: at most 64 * 2**-24 of the largest.
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
