"""Which implementation runs, what it says about itself, and what it refuses."""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels.scales import DoubleQuantScales

N, K, BLOCK = 8, 64, 32


@pytest.fixture
def weight():
    rng = np.random.default_rng(0)
    packed = jnp.asarray(rng.integers(0, 256, (N, K // 2), np.uint8))
    scales = jnp.asarray(rng.uniform(0.5, 1, (N, K // BLOCK)).astype(np.float32))
    return packed, scales, jnp.asarray(np.linspace(-1, 1, 16, dtype=np.float32))


def decoded(packed, scales, codebook):
    """The weight in float64, by numpy alone."""
    packed, scales, codebook = (np.asarray(a) for a in (packed, scales, codebook))
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(packed.shape[0], -1)
    return codebook.astype(np.float64)[codes] * np.repeat(scales.astype(np.float64), BLOCK, 1)


def test_importing_touches_no_device_and_no_gpu_module():
    code = (
        "import sys, pallas_kernels; "
        "assert not any(m.startswith('jax.experimental.pallas') for m in sys.modules)"
    )
    # With a platform that does not exist, the first touch of a device raises.
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"JAX_PLATFORMS": "no"}
    )


def test_unknown_implementation_names_the_known_ones(weight):
    message = "implementation is 'cuda'; it must be None or one of 'xla', 'mosaic_gpu', 'triton'"
    with pytest.raises(ValueError, match=message):
        pallas_kernels.matmul(jnp.ones((1, K)), *weight, block_size=BLOCK, implementation="cuda")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mosaic_gpu", "it needs an NVIDIA Hopper GPU .compute capability 9.0., and this is cpu"),
        ("triton", "it needs an NVIDIA GPU, and this is cpu"),
    ],
)
def test_a_named_kernel_that_cannot_run_says_why(weight, name, why):
    message = f"matmul cannot run with implementation='{name}': .*{why}"
    with pytest.raises(NotImplementedError, match=message):
        pallas_kernels.matmul(jnp.ones((1, K)), *weight, block_size=BLOCK, implementation=name)


def test_explain_takes_shapes_and_names_the_implementation(weight):
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in weight]
    text = pallas_kernels.explain("dequantize", *shapes, block_size=BLOCK, dtype=jnp.bfloat16)
    assert text.startswith("xla: ") and "cpu" in text


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_xla_ops_agree_with_numpy(weight, implementation):
    w = decoded(*weight)
    rng = np.random.default_rng(1)
    how = dict(block_size=BLOCK, implementation=implementation)
    for transpose, contracted in ((False, K), (True, N)):
        x = rng.standard_normal((3, contracted)).astype(np.float32)
        y = pallas_kernels.matmul(jnp.asarray(x), *weight, transpose=transpose, **how)
        want = x.astype(np.float64) @ (w if transpose else w.T)
        # float32 sums of at most 64 products: 64 * 2^-24 of the terms' size, about 1e-5.
        np.testing.assert_allclose(y, want, atol=1e-4)
    got = pallas_kernels.dequantize(*weight, dtype=jnp.float32, **how)
    np.testing.assert_array_equal(got, w.astype(np.float32))  # a product rounds the same either way


def test_a_layer_of_a_stack_is_that_layer(weight):
    packed, scales, codebook = weight
    rng = np.random.default_rng(2)
    codes = jnp.asarray(rng.integers(0, 256, (2, N, K // BLOCK), np.uint8))
    double = DoubleQuantScales(
        codes, jnp.asarray([[0.5], [0.25]]), jnp.asarray([1.0, 2.0]), jnp.linspace(-1, 1, 256)
    )
    stack = jnp.stack([packed[::-1], packed])
    for stacked, one in [
        (jnp.stack([scales[::-1], scales]), scales),
        (double, double._replace(codes=codes[1], absmax=double.absmax[1], offset=double.offset[1])),
    ]:
        how = dict(block_size=BLOCK, dtype=jnp.float32)
        got = pallas_kernels.dequantize(stack, stacked, codebook, layer=jnp.int32(1), **how)
        np.testing.assert_array_equal(got, pallas_kernels.dequantize(packed, one, codebook, **how))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(packed=jnp.zeros((N, K // 2), jnp.int32)), TypeError, "packed must be uint8"),
        (dict(packed=jnp.zeros((N,), jnp.uint8)), ValueError, r"packed must be \[N, K // 2\]"),
        (dict(scales=jnp.ones((N, 3))), ValueError, r"scales has shape \(8, 3\).*needs \(8, 2\)"),
        (dict(codebook=jnp.ones((8,))), ValueError, "codebook must have 16 entries"),
        (dict(x=jnp.ones((2, N))), ValueError, r"x must be \[M, K\] = \[M, 64\]"),
        (dict(x=jnp.ones((2, K), jnp.int32)), TypeError, "x must be floating point and is int32"),
        (dict(block_size=48), ValueError, "block_size is 48, which does not divide K = 64"),
        (
            dict(packed=jnp.zeros((0, K // 2), jnp.uint8)),
            ValueError,
            r"packed must not be empty and has shape \(0, 32\)",
        ),
        (dict(layer=0), ValueError, r"packed must be \[L, N, K // 2\]"),
    ],
)
def test_misuse_is_named(weight, change, error, message):
    packed, scales, codebook = weight
    arguments = dict(
        x=jnp.ones((2, K)), packed=packed, scales=scales, codebook=codebook, block_size=BLOCK
    )
    with pytest.raises(error, match=message):
        pallas_kernels.matmul(**(arguments | change))


def on(kind):
    """As if traced for a GPU of this kind."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=100, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def shapes(m, n, k, block, dtype, transpose):
    shape = jax.ShapeDtypeStruct
    x = shape((m, n if transpose else k), dtype)
    scales = shape((n, k // block), jnp.float32)
    return x, shape((n, k // 2), jnp.uint8), scales, shape((16,), jnp.float32)


# Each refuses some kernel: rows, width, length, block size, dtype, direction.
CALLS = list(
    itertools.product(
        (1, 3, 40, 300, 8192),
        (515, 4096),
        (192, 4608),
        (32, 48),
        ("bfloat16", "float32"),
        (False, True),
    )
)


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"])
def test_every_backend_passed_over_says_why_with_the_value(kind):
    backends = dispatch._BACKENDS["matmul"]
    with on(kind):
        for *sizes, block, dtype, transpose in CALLS:
            args = shapes(*sizes, block, dtype, transpose)
            options = {"block_size": block, "transpose": transpose}
            choice = dispatch.resolve("matmul", None, *args, **options)
            ahead = backends[: backends.index(choice.backend)]
            assert tuple(backend for backend, _ in choice.rejected) == ahead
            values = {*map(str, sizes), str(block), dtype, "transpose=True", kind}
            for _, why in choice.rejected:
                assert any(value in why for value in values), why
                assert why in pallas_kernels.explain("matmul", *args, **options)


def test_a_named_implementation_that_refuses_gives_all_its_reasons():
    args = shapes(300, 515, 4608, 48, "float32", False)
    expected = (
        "matmul cannot run with implementation='mosaic_gpu': Hopper kernels for few rows: x is "
        "float32; the kernel multiplies in bfloat16 or float16; Hopper kernel for many rows: x is "
        "float32; the kernel multiplies bfloat16 and float16"
    )
    with on("NVIDIA H100 80GB HBM3"), pytest.raises(NotImplementedError) as caught:
        dispatch.resolve("matmul", "mosaic_gpu", *args, block_size=48)
    assert str(caught.value) == expected


@pytest.mark.parametrize("shape", [(0, 64), (64,)])
def test_a_weight_to_quantize_has_rows(shape):
    with pytest.raises(ValueError, match=r"w must be \[N, K\], not empty, and has shape"):
        pallas_kernels.quantize(jnp.ones(shape), np.linspace(-1, 1, 16), block_size=BLOCK)


@pytest.mark.parametrize("op", ["quantize", "dequantize"])
def test_an_op_without_the_named_implementation_says_so(op):
    with pytest.raises(NotImplementedError, match="mosaic_gpu': it has no such backend"):
        dispatch.resolve(op, "mosaic_gpu")
    with pytest.raises(ValueError, match="op is 'conv', and the ops are"):
        dispatch.resolve("conv", None)
