"""Every matmul regime through the public function on a GPU: poison, non-finite rows, vmap, scan."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dequantize, dispatch, matmul, quantize
from tests.pallas_kernels.problems import H100, NF4, decoded, lower, weight

BLOCK = 64


class Regime(NamedTuple):
    """Arguments that one backend is chosen for; N and M are ragged where it takes that."""

    backend: str
    kernel: str  # its name in the lowered module
    m: int
    n: int
    k: int
    transpose: bool = False
    implementation: str | None = None


REGIMES = {
    "decode": Regime("mosaic_gpu", "qjax_matmul_decode", 3, 515, 2880),
    "mid": Regime("mosaic_gpu", "qjax_matmul_mid", 41, 515, 2880),
    "large": Regime("mosaic_large", "qjax_matmul_large", 301, 1096, 2880, False, "mosaic_gpu"),
    "large, transposed": Regime(
        "mosaic_large", "qjax_matmul_large", 301, 1096, 2880, True, "mosaic_gpu"
    ),
    "decoded": Regime("decoded", "dequantize_4bit_triton", 301, 515, 2880),
    "triton": Regime("triton", "matmul_4bit_triton", 3, 515, 2880, False, "triton"),
}
both_scales = pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
regimes = pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)


def problem(regime: Regime, double=False, layers=None):
    """(x, packed, scales, codebook), options of `matmul`."""
    packed, scales = weight(regime.n, regime.k, BLOCK, double=double, layers=layers)
    contracted = regime.n if regime.transpose else regime.k
    x = np.random.default_rng(1).standard_normal((regime.m, contracted))
    options = {"transpose": regime.transpose, "implementation": regime.implementation}
    args = jnp.asarray(x, jnp.bfloat16), packed, scales, jnp.asarray(NF4)
    return args, options | {"block_size": BLOCK}


def expected(x, packed, scales, transpose, layer=None):
    """The product in float64, by numpy alone."""
    w = decoded(packed, scales, BLOCK, layer)
    with np.errstate(invalid="ignore"):  # of non-finite rows
        return np.asarray(x).astype(np.float64) @ (w if transpose else w.T)


def check(y, want):
    # Code, scale, their product and the result are each rounded to bfloat16, 2^-9 at most: in
    # quadrature less than 2^-8.
    y = np.asarray(y).astype(np.float64)
    assert np.linalg.norm(y - want) <= 2.0**-8 * np.linalg.norm(want)


@regimes
def test_the_intended_kernel_is_lowered(regime):
    args, options = problem(regime)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=H100)
    with jax.sharding.use_abstract_mesh(mesh):
        choice = dispatch.resolve("matmul", regime.implementation, *shapes, **as_given(options))
    assert choice.backend.name == regime.backend
    assert regime.kernel in lower(functools.partial(matmul, **options), *args)


def as_given(options: dict) -> dict:
    return {name: value for name, value in options.items() if name != "implementation"}


def poison() -> None:
    """Leave NaN in the memory that the next allocations get."""
    for array in [jnp.full((2**i,), jnp.nan, jnp.float32) for i in range(8, 27)]:
        array.block_until_ready().delete()


@pytest.mark.gpu
@both_scales
@regimes
def test_every_element_is_written_and_the_same_each_time(regime, double):
    args, options = problem(regime, double)
    lowered = jax.jit(functools.partial(matmul, **options)).lower(*args)
    assert regime.kernel in lowered.as_text()
    compiled = lowered.compile()
    runs = []
    for _ in range(3):
        poison()
        runs.append(np.asarray(compiled(*args)))
    check(runs[0], expected(*args[:3], regime.transpose))
    for other in runs[1:]:
        np.testing.assert_array_equal(other, runs[0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mid", "large"])
def test_replayed_cuda_graphs_give_the_same(name):
    """Sums that blocks leave to others are marked in memory that nobody clears before a replay."""
    args, options = problem(REGIMES[name])
    lowered = jax.jit(functools.partial(matmul, **options)).lower(*args)
    graphs = {
        "xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL",
        "xla_gpu_graph_min_graph_size": 1,
    }
    compiled = lowered.compile(compiler_options=graphs)
    first = np.asarray(compiled(*args))
    check(first, expected(*args[:3], options["transpose"]))
    for i in range(50):
        if i % 10 == 0:
            poison()
        np.testing.assert_array_equal(np.asarray(compiled(*args)), first)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@regimes
def test_a_non_finite_row_stays_in_its_row(regime, value):
    (x, *rest), options = problem(regime)
    run = jax.jit(functools.partial(matmul, **options))
    clean = np.asarray(run(x, *rest)).astype(np.float32)
    dirty = np.asarray(run(x.at[1, 77].set(value), *rest)).astype(np.float32)
    want = expected(x.at[1, 77].set(value), *rest[:2], regime.transpose)
    np.testing.assert_array_equal(np.isfinite(dirty), np.isfinite(want))
    np.testing.assert_array_equal(np.delete(dirty, 1, 0), np.delete(clean, 1, 0))


@pytest.mark.gpu
@both_scales
@regimes
def test_vmap_over_weights_and_over_rows(regime, double):
    (x, packed, scales, codebook), options = problem(regime, double, layers=3)
    axes = scales._replace(codes=0, absmax=0, offset=0, table=None) if double else 0
    call = functools.partial(matmul, codebook=codebook, **options)
    experts = jax.jit(jax.vmap(call, in_axes=(None, 0, axes)))(x, packed, scales)
    for i in range(3):
        check(experts[i], expected(x, packed, scales, regime.transpose, i))
    one = jax.tree.map(lambda a: a[0], (packed, scales._replace(table=()) if double else scales))
    one = (one[0], one[1]._replace(table=scales.table)) if double else one
    rows = jax.jit(jax.vmap(call, in_axes=(0, None, None)))(jnp.stack([x, 2 * x]), *one)
    want = expected(x, packed, scales, regime.transpose, 0)
    check(rows[0], want)
    check(rows[1], 2 * want)


@pytest.mark.gpu
@regimes
def test_scan_reads_layers_in_place(regime):
    (x, packed, scales, codebook), options = problem(regime, layers=3)

    def layers(x, packed, scales):
        def step(carry, layer):
            return carry, matmul(x, packed, scales, codebook, layer=layer, **options)

        return jax.lax.scan(step, None, jnp.arange(3))[1]

    compiled = jax.jit(layers).lower(x, packed, scales).compile()
    copied = rf"= u8\[(?:1,)?{regime.n},{regime.k // 2}\]\S* (?:copy|dynamic-slice|fusion)\("
    assert re.findall(copied, compiled.as_text()) == []
    for layer, y in enumerate(compiled(x, packed, scales)):
        check(y, expected(x, packed, scales, regime.transpose, layer))


@pytest.mark.gpu
@both_scales
def test_dequantize_and_quantize_write_every_element(double):
    packed, scales = weight(515, 2880, BLOCK, double=double)
    want = decoded(packed, scales, BLOCK)
    poison()
    got = dequantize(
        packed,
        scales,
        jnp.asarray(NF4),
        block_size=BLOCK,
        dtype=jnp.float32,
        implementation="triton",
    )
    # A float32 scale and its product with a code: two roundings of 2^-24, three when double.
    np.testing.assert_allclose(got, want, rtol=3 * 2.0**-24, atol=1e-7)
    poison()
    codes, absmax = quantize(got, NF4, block_size=BLOCK, implementation="triton")
    largest = np.abs(np.asarray(got)).reshape(515, -1, BLOCK).max(-1)
    np.testing.assert_array_equal(absmax, largest)
    # Each value decodes again to within half of the widest gap between codes.
    again = decoded(codes, absmax, BLOCK)
    half_gap = np.diff(NF4).max() / 2 * np.repeat(largest, BLOCK, 1)
    assert (np.abs(again - np.asarray(got)) <= half_gap * (1 + 1e-6)).all()
