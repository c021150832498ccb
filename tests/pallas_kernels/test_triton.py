"""The Triton kernels: their jnp on any device, their lowering for CUDA, their bits on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dequantize, matmul, quantize
from pallas_kernels.dequantize import triton as dequantize_triton
from pallas_kernels.matmul import triton as matmul_triton
from pallas_kernels.quantize import triton as quantize_triton
from pallas_kernels.quantize.reference import decision_bounds
from pallas_kernels.quantize.reference import quantize as quantize_reference
from tests.pallas_kernels.problems import NF4, decoded, lower, weight

# FP4 by bitsandbytes' values: not sorted, and two of them equal.
FP4 = np.array([0, 0.0052, 0.6667, 1, 0.3333, 0.5, 0.1667, 0.25], np.float32)
FP4 = np.concatenate([FP4, -FP4]) + np.float32(0)
# N, K, block, double: nothing here is a multiple of a tile.
WEIGHTS = [(37, 320, 32, False), (5, 4096, 4096, False), (13, 2880, 64, True)]


@pytest.mark.parametrize("n, k, block, double", WEIGHTS)
@pytest.mark.parametrize("layers", [None, 2])
def test_dequantize_gives_the_reference_bits(n, k, block, double, layers):
    packed, scales = weight(n, k, block, double=double, layers=layers)
    layer = None if layers is None else 1
    how = dict(block_size=block, dtype=jnp.float32, layer=layer)
    got = dequantize_triton.dequantize(packed, scales, jnp.asarray(NF4), **how, interpret=True)
    want = dequantize(packed, scales, jnp.asarray(NF4), **how, implementation="xla")
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("n, k, block, double", WEIGHTS)
@pytest.mark.parametrize("m", [1, 4])
def test_matmul_agrees_with_float64(n, k, block, double, m):
    packed, scales = weight(n, k, block, double=double, layers=2)
    x = np.random.default_rng(1).standard_normal((m, k)).astype(np.float32)
    y = matmul_triton.matmul(
        jnp.asarray(x), packed, scales, jnp.asarray(NF4), block_size=block, layer=1, interpret=True
    )
    want = x.astype(np.float64) @ decoded(packed, scales, block, layer=1).T
    # A sum of k float32 products of size about 1: sqrt(k) 2^-24 is 4e-6; x 50 for its tail.
    np.testing.assert_allclose(y, want, atol=2e-4)


def weights_with_ties(codebook, block):
    """Rows of ordinary and non-finite values, zeros, exact codes, bounds and their neighbours."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((12, 4 * block)).astype(np.float32)
    w[1], w[2, 3], w[3, 4], w[4] = 0, np.nan, np.inf, w[4] * 1e-30
    w[5:8] = codebook[rng.integers(0, 16, w[5:8].shape)]
    bounds = decision_bounds(codebook)[0]
    bounds = bounds[np.abs(bounds) > 1e-30]  # XLA on a CPU reads the neighbours of 0 as 0
    near = [np.nextafter(bounds, np.float32(to)) for to in (-2, 2)]
    w[8:] = np.concatenate([bounds, *near])[rng.integers(0, 3 * len(bounds), w[8:].shape)]
    w[8:, ::block] = 1
    return w


@pytest.mark.parametrize("codebook", [NF4, FP4], ids=["nf4", "fp4"])
@pytest.mark.parametrize(
    "block, dtype", [(32, jnp.float32), (64, jnp.bfloat16), (256, jnp.float16)]
)
def test_quantize_gives_the_reference_bits(codebook, block, dtype):
    w = jnp.asarray(weights_with_ties(codebook, block), dtype)
    packed, absmax = quantize_triton.quantize(w, codebook, block_size=block, interpret=True)
    want = quantize_reference(w, codebook, block_size=block)
    np.testing.assert_array_equal(packed, want[0])
    np.testing.assert_array_equal(absmax, want[1])


def test_a_codebook_too_fine_for_bins_is_refused():
    fine = np.linspace(0, 1e-4, 16, dtype=np.float32)
    why = quantize_triton.unsupported(jnp.ones((1, 64)), fine, block_size=64)
    assert "closer than the kernel's finest bins" in why


# Layers of 2**27 bytes. Pallas counts in 32 bits, signed, up to 2**32 bytes: not all of 17 layers.
BIG = 4096, 2**16


@pytest.mark.parametrize("layers, reached", [(16, True), (17, False), (32, False), (33, True)])
def test_stacks_that_offsets_do_not_reach(layers, reached):
    n, k = BIG
    packed = jax.ShapeDtypeStruct((layers, n, k // 2), jnp.uint8)
    scales = jax.ShapeDtypeStruct((layers, n, k // 64), jnp.float32)
    how = dict(block_size=64, dtype=jnp.bfloat16)
    why = dequantize_triton.unsupported(packed, scales, NF4, **how, layer=1)
    assert (why is None) == reached
    assert reached or f"packed has {layers * n * k // 2} bytes" in why


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("layer", [None, 1])
def test_every_kernel_lowers_for_cuda_under_its_name(double, layer):
    layers = None if layer is None else 2
    packed, scales = weight(13, 2880, 64, double=double, layers=layers)
    how = dict(block_size=64, layer=layer, implementation="triton")
    text = lower(functools.partial(dequantize, dtype=jnp.bfloat16, **how), packed, scales, NF4)
    assert "dequantize_4bit_triton" in text
    for m, name in ((1, "matmul_4bit_triton"), (300, "dequantize_4bit_triton")):
        x = jnp.ones((m, 2880), jnp.bfloat16)
        assert name in lower(functools.partial(matmul, **how), x, packed, scales, NF4)
    assert "quantize_4bit_triton" in lower(
        lambda w: quantize(w, NF4, block_size=64, implementation="triton"), jnp.ones((13, 2880))
    )


@pytest.mark.gpu
@pytest.mark.parametrize("n, k, block, double", [*WEIGHTS, (4096, 4096, 64, True)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_gpu_dequantize_gives_the_cpu_bits(n, k, block, double, dtype):
    packed, scales = weight(n, k, block, double=double)
    how = dict(block_size=block, dtype=dtype)
    got = dequantize(packed, scales, jnp.asarray(NF4), **how, implementation="triton")
    cpu = jax.device_put((packed, scales, NF4), jax.devices("cpu")[0])
    want = dequantize(*cpu, **how, implementation="xla")
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.gpu
@pytest.mark.parametrize("codebook", [NF4, FP4], ids=["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 256, 4096])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_gpu_quantize_gives_the_cpu_bits(codebook, block, dtype):
    w = jnp.asarray(weights_with_ties(codebook, block), dtype)
    got = quantize(w, codebook, block_size=block, implementation="triton")
    want = quantize_reference(jax.device_put(w, jax.devices("cpu")[0]), codebook, block_size=block)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.gpu
@pytest.mark.parametrize("n, k, block, double", WEIGHTS)
@pytest.mark.parametrize("m, dtype", [(1, jnp.bfloat16), (4, jnp.float32), (300, jnp.float16)])
def test_gpu_matmul_agrees_with_float64(n, k, block, double, m, dtype):
    packed, scales = weight(n, k, block, double=double)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((m, k)), dtype)
    y = matmul(x, packed, scales, jnp.asarray(NF4), block_size=block, implementation="triton")
    want = np.asarray(x).astype(np.float64) @ decoded(packed, scales, block).T
    error = np.linalg.norm(np.asarray(y).astype(np.float64) - want) / np.linalg.norm(want)
    # The weight and the result are rounded to x's dtype, half a unit in the last place each.
    assert error < {"bfloat16": 2**-8, "float16": 2**-11, "float32": 1e-5}[jnp.dtype(dtype).name]


@pytest.mark.gpu
def test_gpu_dequantize_reaches_the_last_layer_of_a_large_stack():
    (n, k), layers = BIG, 33
    packed = jax.jit(lambda: jnp.zeros((layers, n, k // 2), jnp.uint8).at[-1].set(0x1F))()
    scales = jnp.ones((layers, n, k // 64))
    how = dict(block_size=64, dtype=jnp.bfloat16, layer=layers - 1, implementation="triton")
    got = dequantize(packed, scales, jnp.asarray(NF4), **how).reshape(-1, 2)
    assert (got == jnp.asarray(NF4[[1, 15]], jnp.bfloat16)[None]).all()
