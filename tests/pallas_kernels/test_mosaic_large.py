"""The Hopper matmul for many rows of x: lowering for CUDA anywhere, and results on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, matmul
from pallas_kernels.matmul import mosaic_large
from pallas_kernels.matmul.config_large import LARGE_STEP_US, choose_large
from tests.pallas_kernels.problems import H100, NF4, decoded, lower, weight

# M, outputs, contracted, block, double, layers, dtype
SHAPES = [
    (256, 4096, 4096, 64, False, None, "bfloat16"),
    (300, 1088, 576, 32, True, 3, "bfloat16"),
    (129, 192, 2880, 64, True, None, "float16"),
    (1000, 512, 11008, 256, False, 2, "bfloat16"),
    (40, 256, 1024, 64, False, None, "bfloat16"),
]


def problem(m, outputs, contracted, block, double, layers, dtype, transpose):
    n, k = (contracted, outputs) if transpose else (outputs, contracted)
    block = block if k % block == 0 else 64
    packed, scales = weight(n, k, block, double=double, layers=layers)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((m, contracted)), dtype)
    layer = None if layers is None else layers - 1
    return (x, packed, scales, jnp.asarray(NF4)), dict(
        block_size=block, transpose=transpose, layer=layer
    )


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_lowers_for_cuda(shape, transpose):
    args, how = problem(*shape, transpose)
    text = lower(functools.partial(mosaic_large.matmul, **how), *args)
    assert "qjax_matmul_large" in text
    # A slice of a stack is read in place.
    assert "dynamic_slice" not in text and "gather" not in text


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("tiles", LARGE_STEP_US)
def test_every_tile_choice_lowers(tiles, transpose):
    args, how = problem(520, 512, 512, 64, True, None, "bfloat16", transpose)
    text = lower(functools.partial(mosaic_large.matmul, config=tiles, **how), *args)
    assert "qjax_matmul_large" in text


def test_every_shape_has_tiles_that_divide_it():
    for m in (1, 129, 256, 1024, 8192):
        for outputs in (64, 192, 1088, 4096, 128256):
            tiles = choose_large(m, outputs, 4096, 132)
            assert outputs % tiles.outputs == 0


@pytest.mark.parametrize(
    "shape, message",
    [
        ((256, 4100, 4096), "N is 4100; the kernel needs a multiple of 64"),
        ((256, 4096, 480), "K is 480; the kernel needs a multiple of 64"),
        ((256, 4096, 256), "K is 256; the kernel needs a multiple of 64, 512 at least"),
    ],
)
def test_a_shape_that_cannot_run_says_why(shape, message):
    m, n, k = shape
    packed, scales = weight(n, k, 32)
    x = jnp.ones((m, k), jnp.bfloat16)
    assert message in mosaic_large.unsupported(x, packed, scales, NF4, block_size=32)


@pytest.mark.parametrize("m, module", [(256, "mosaic_large"), (8192, "decoded")])
def test_dispatch_takes_the_faster_of_fused_and_decoded(m, module):
    shape = jax.ShapeDtypeStruct
    x, packed = shape((m, 4096), jnp.bfloat16), shape((14336, 2048), jnp.uint8)
    scales, codebook = shape((14336, 64), jnp.float32), shape((16,), jnp.float32)
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("x",), abstract_device=H100)
    ):
        choice = dispatch.resolve("matmul", None, x, packed, scales, codebook, block_size=64)
    # On an H100: 62 us fused against 104 decoded at 256 rows, 1612 against 1243 at 8192.
    assert choice.backend.module.endswith(module)


@pytest.mark.gpu
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gpu_agrees_with_float64_and_with_itself(shape, transpose):
    args, how = problem(*shape, transpose)
    y = mosaic_large.matmul(*args, **how)
    again = mosaic_large.matmul(*args, **how)
    w = decoded(*args[1:3], how["block_size"], how["layer"])
    want = np.asarray(args[0]).astype(np.float64) @ (w if transpose else w.T)
    error = np.linalg.norm(np.asarray(y).astype(np.float64) - want) / np.linalg.norm(want)
    # Code, scale, their product and the result are each rounded to x's dtype: 4 x half a unit,
    # in quadrature less.
    assert error < {"bfloat16": 2**-8, "float16": 2**-11}[shape[-1]]
    np.testing.assert_array_equal(np.asarray(y), np.asarray(again))


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", LARGE_STEP_US)
@pytest.mark.parametrize("m", [256, 520])
def test_gpu_every_tile_choice_is_right(tiles, m):
    args, how = problem(m, 1024, 1088, 64, False, None, "bfloat16", False)
    y = mosaic_large.matmul(*args, config=tiles, **how)
    want = matmul(*args, **how, implementation="xla")
    scale = np.abs(np.asarray(want)).astype(np.float64).max()
    np.testing.assert_allclose(
        np.asarray(y).astype(np.float64), np.asarray(want).astype(np.float64), atol=2**-6 * scale
    )
