"""DoRA's norms and spread vectors, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.blockwise import quantize
from qjax.core.config import QuantConfig
from qjax.ops.dora import column_norms, dora_weight, spread

# Sums of 64 float32 terms: 64 * 2**-24 relative, doubled for the sum of three squares.
RTOL = 1e-5
CASES = {  # shape of w, its contract axes, its batch axes
    "dense": ((64, 6), (0,), 0),
    "heads": ((64, 2, 3), (0,), 0),
    "out": ((2, 32, 6), (0, 1), 0),
    "middle": ((3, 64, 4), (1,), 0),
    "experts": ((3, 64, 4), (0,), 1),
    "flat": ((48, 5), (0,), 0),
}


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_norms_are_those_of_the_merged_weight(name, quantized, rng):
    shape, contract, batch_ndim = CASES[name]
    w = jnp.asarray(rng.normal(size=shape), jnp.float32)
    if quantized:
        w = quantize(w, QuantConfig(block_size=32), contract, batch_ndim=batch_ndim)
    decoded = np.asarray(w.dequantize() if quantized else w, np.float64)
    batch, rest = shape[:batch_ndim], shape[batch_ndim:]
    out = [n for i, n in enumerate(rest) if i not in contract]
    a = rng.normal(size=(*batch, *(rest[i] for i in contract), 2))
    b = rng.normal(size=(*batch, 2, *out))
    flat = a.reshape(*batch, -1, 2) @ b.reshape(*batch, 2, -1)
    update = flat.reshape(*batch, *(rest[i] for i in contract), *out)
    axes = [batch_ndim + i for i in contract]
    update = np.moveaxis(update, range(batch_ndim, batch_ndim + len(axes)), axes)
    merged = decoded + 0.5 * update
    norms = np.sqrt((merged**2).sum(axis=tuple(axes)))
    a32, b32 = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    found = column_norms(w, a32, b32, 0.5, contract, batch_ndim)
    np.testing.assert_allclose(found, norms, rtol=RTOL)
    magnitude = rng.uniform(0.5, 2, size=norms.shape)
    weight = dora_weight(
        jnp.asarray(decoded, jnp.float32),
        *(a32, b32, jnp.asarray(magnitude, jnp.float32)),
        *(0.5, contract, batch_ndim),
    )
    expected = merged * np.expand_dims(magnitude / norms, tuple(axes))
    np.testing.assert_allclose(weight, expected, rtol=RTOL, atol=RTOL)


def test_norms_are_constants_to_the_gradient(rng):
    w, a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((32, 4), (32, 2), (2, 4)))
    grads = jax.grad(lambda *p: column_norms(*p, 1.0, (0,)).sum(), argnums=(0, 1, 2))(w, a, b)
    assert not any(np.any(g) for g in grads)


@pytest.mark.parametrize(
    "equation, x_ndim, contract, batch_ndim, shape, spread_shape",
    [
        ("btd,dnh->btnh", 3, (0,), 0, (2, 3), (1, 1, 2, 3)),
        ("...d,ndh->n...h", 3, (1,), 0, (2, 3), (2, 1, 1, 3)),
        ("end,edf->enf", 3, (0,), 1, (4, 3), (4, 1, 3)),
        ("btd,dnh->bhnt", 3, (0,), 0, (2, 3), (1, 3, 2, 1)),
    ],
)
def test_a_vector_broadcasts_against_the_result(
    equation, x_ndim, contract, batch_ndim, shape, spread_shape
):
    v = jnp.arange(np.prod(shape)).reshape(shape)
    found = spread(v, equation, x_ndim, contract, batch_ndim)
    assert found.shape == spread_shape
    ordered = v.T if equation.endswith("bhnt") else v
    np.testing.assert_array_equal(found.ravel(), ordered.ravel())


def test_other_axes_are_refused():
    with pytest.raises(NotImplementedError, match=r"'btf,df->btd' sums over other axes"):
        spread(jnp.ones(4), "btf,df->btd", 3, (0,), 0)
