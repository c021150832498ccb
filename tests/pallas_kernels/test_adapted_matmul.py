"""adapted_matmul against float64 numpy; `test_mosaic_bodies` has the kernels on the CPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import adapted_matmul
from pallas_kernels.adapted_matmul import mosaic_gpu
from tests.pallas_kernels.problems import NF4, decoded, lower, weight


def problem(m, n, k, *, rank, sections, dtype: Any = np.float32, layers=2, double=True):
    """(x, packed, scales, codebook, adapter, residual) and what they give, in float64."""
    rng = np.random.default_rng(0)
    packed, scales = weight(n, k, 64, double=double, layers=layers)
    shapes = (m, k), (m, len(sections) * rank), (layers, n, rank), (m, n)
    x, hidden, b, residual = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    wide = [np.asarray(a, np.float64) for a in (x, hidden, b[-1], residual)]
    owner = np.repeat(np.arange(len(sections)), sections)
    own = wide[1].reshape(m, len(sections), rank)[:, owner]  # [M, N, rank]
    product = wide[0] @ decoded(packed, scales, 64, layers - 1).T
    want = product + np.einsum("mnr,nr->mn", own, wide[2]) + wide[3]
    return (x, packed, scales, jnp.asarray(NF4), (hidden, b), residual), want


def error(y, want) -> float:
    return float(np.linalg.norm(np.asarray(y, np.float64) - want) / np.linalg.norm(want))


@pytest.mark.parametrize("sections", [(48,), (16, 22, 10)])
def test_xla_agrees_with_float64(sections):
    arrays, want = problem(3, 48, 128, rank=4, sections=sections)
    y = adapted_matmul(*arrays, block_size=64, sections=sections, layer=1)
    assert error(y, want) < 1e-6  # sums of 128 terms in float32


def test_a_batch_of_calls_is_one_after_another():
    arrays, want = problem(4, 32, 64, rank=2, sections=(32,))
    x, packed, scales, codebook, (hidden, b), residual = arrays

    def one(x, hidden, residual):
        adapter = hidden[None], b
        rest = packed, scales, codebook, adapter, residual[None]
        return adapted_matmul(x[None], *rest, block_size=64, layer=1)[0]

    assert error(jax.vmap(one)(x, hidden, residual), want) < 1e-6  # as above


@pytest.mark.parametrize("m", [1, 20])
def test_the_kernels_lower_for_cuda(m):
    arrays, _ = problem(m, 64, 256, rank=16, sections=(48, 16), dtype=jnp.bfloat16)
    call = functools.partial(adapted_matmul, block_size=64, sections=(48, 16))
    text = lower(lambda *a: call(*a[:-1], layer=a[-1]), *arrays, jnp.int32(1))
    assert ("qjax_matmul_decode" if m <= 16 else "qjax_matmul_mid") in text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": (1, 32)}, r"x must be \[M, K\] = \[M, 64\] and has shape \(1, 32\)"),
        ({"b": (7, 2)}, r"adapter's B must be \[8, 'rank'\] and has shape \(7, 2\)"),
        ({"sections": (4, 5)}, r"sections \(4, 5\) must sum up to the 8 rows of W"),
        ({"sections": (4, 4)}, r"hidden must be \[1, 4\] \(2 sections of rank 2\) and has"),
        ({"residual": (2, 8)}, r"residual must be float32\[1, 8\] and is float32\[2,8\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    given = {"x": (1, 64), "b": (8, 2), "residual": (1, 8), "sections": (8,)} | change
    packed, scales = weight(8, 64, 64)
    adapter = jnp.ones((1, 2)), jnp.ones(given["b"])
    arrays = jnp.ones(given["x"]), packed, scales, jnp.asarray(NF4), adapter
    residual = jnp.ones(given["residual"])
    with pytest.raises(ValueError, match=message):
        adapted_matmul(*arrays, residual, block_size=64, sections=given["sections"])


def test_adapters_that_the_kernels_cannot_read():
    (x, packed, scales, codebook, (hidden, b), _), _ = problem(
        1, 32, 64, rank=3, sections=(24, 8), dtype=jnp.bfloat16
    )
    why = functools.partial(mosaic_gpu.unsupported, x, packed, scales, codebook, block_size=64)
    assert why((hidden, b), sections=(24, 8)) == "the rank is 3; the kernel reads pairs"
    even = hidden[:, :4], b[..., :2]
    assert why(even, sections=(24, 8)) == "sections are (24, 8); the kernel takes multiples of 16"
    assert why(even, sections=(16, 16)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 3, 16, 20, 32])
@pytest.mark.parametrize(
    "n, k, rank, sections",
    [
        (12288, 4096, 16, (4096, 4096, 4096)),
        (4096, 11008, 16, (4096,)),
        (1000, 2880, 6, (512, 488)),
        (4096, 4096, 128, (2048, 2048)),
    ],
    ids=str,
)
def test_the_kernels_agree_with_float64_on_a_gpu(m, n, k, rank, sections):
    arrays, want = problem(m, n, k, rank=rank, sections=sections, dtype=jnp.bfloat16)
    call = functools.partial(
        adapted_matmul, block_size=64, sections=sections, implementation="mosaic_gpu"
    )
    y = jax.jit(lambda *a: call(*a[:-1], layer=a[-1]))(*arrays, jnp.int32(1))
    assert error(y, want) < 2**-7  # codes, scales and the result in bfloat16: 2^-9 each
