"""The bodies of the Hopper matmul kernels, simulated on the CPU, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.matmul import decode_layout, mid_layout, mosaic_decode, mosaic_mid
from pallas_kernels.matmul.config import DecodeTiles, MidTiles
from pallas_kernels.matmul.problem import describe
from tests.pallas_kernels import simulated_machine
from tests.pallas_kernels.block_simulator import simulate
from tests.pallas_kernels.test_matmul_mosaic import random_call

SMS = 4  # few, so that a block has several tiles


def run_decode(monkeypatch, problem, operands, tiles):
    layout = decode_layout.Layout(problem, tiles, max(SMS, 2 * tiles.slabs))
    out = np.full((problem.m, problem.n), np.nan, jnp.dtype(problem.dtype))

    def make(refs, out, scratch):
        return mosaic_decode._Block(None, problem, tiles, layout, refs, out, scratch)

    blocks, threads = layout.clusters * tiles.slabs, 32 * tiles.warps
    run = monkeypatch, layout, tiles, blocks, threads, operands, out, make
    return simulate(*run, cluster=tiles.slabs)


def run_mid(monkeypatch, problem, operands, tiles):
    layout = mid_layout.Layout(problem, tiles)
    out = np.full((problem.m, problem.n), np.nan, jnp.dtype(problem.dtype))
    sums = []

    def make(refs, out, scratch):
        # What was in memory before does not matter.
        if not sums:
            poison = [np.full(s.shape, -1, np.int32).view(s.dtype) for s in layout.sums()]
            sums.extend(simulated_machine.machine.allocate_global(array) for array in poison)
        return mosaic_mid._Block(None, problem, tiles, layout, refs, out, sums, scratch)

    work = layout.blocks, mid_layout.THREADS, operands, out, make
    return simulate(monkeypatch, layout, tiles, *work, cluster=layout.cluster)


@pytest.mark.parametrize(
    "shape, tiles, kinds",
    [
        ((1, 100, 1024), DecodeTiles(4, 1, 2), {}),
        ((16, 70, 512), DecodeTiles(4, 1, 3), dict(dtype="float16")),
        ((3, 137, 2880), DecodeTiles(4, 3, 2, together=False), dict(double=True)),
        ((9, 90, 2880), DecodeTiles(8, 2, 2), dict(layers=2)),
        ((2, 45, 96, 32), DecodeTiles(4, 1, 2), dict(double=True, layers=3)),
        ((4, 33, 2048, 1024), DecodeTiles(4, 2, 2), {}),
        ((5, 50, 1536, 128), DecodeTiles(4, 3, 2, together=False), {}),
        ((3, 100, 2400, 32), DecodeTiles(4, 1, 2, shared_x=True), {}),
        ((12, 33, 2080, 32), DecodeTiles(4, 2, 3, shared_x=True), dict(double=True)),
        ((4, 240, 4096), DecodeTiles(4, 2, 4), dict(double=True)),
        ((1, 200, 2048), DecodeTiles(4, 4, 2), dict(layers=2)),
    ],
)
def test_decode_body(monkeypatch, shape, tiles, kinds):
    check(monkeypatch, run_decode, shape, tiles, kinds)


@pytest.mark.parametrize(
    "shape, tiles, kinds",
    [
        ((20, 150, 1024), MidTiles(2, 2, 3, 128), {}),
        ((33, 40, 2880), MidTiles(2, 3, 2, 128), dict(double=True)),
        ((72, 37, 768, 32), MidTiles(1, 1, 4, 64), dict(layers=2)),
        ((17, 130, 1536, 512), MidTiles(9, 2, 3, 128), dict(dtype="float16")),
        ((24, 20, 4096, 2048), MidTiles(2, 4, 2, 64), dict(double=True, layers=2)),
        ((104, 304, 352, 32), MidTiles(4, 2, 2, 64), {}),
        ((11, 270, 2560), MidTiles(7, 2, 2, 256), {}),
        ((41, 200, 1280), MidTiles(5, 2, 2, 128), {}),
        ((50, 150, 1024), MidTiles(6, 2, 2, 64, teams=4, cluster=True), {}),
        ((24, 72, 2304), MidTiles(8, 1, 2, 128, teams=4, cluster=True), dict(double=True)),
        ((72, 61, 1280, 32), MidTiles(3, 2, 3, 64, teams=4, cluster=True), dict(dtype="float16")),
        ((97, 72, 1024), MidTiles(4, 2, 2, 64, teams=4, cluster=True), {}),
        ((33, 160, 1536), MidTiles(6, 2, 2, 64, teams=4), dict(layers=2)),
        ((18, 50, 4352), MidTiles(2, 2, 2, 128, teams=4, cluster=True), {}),
        ((100, 264, 1024), MidTiles(4, 1, 2, 64, teams=1, cluster=True), {}),
        ((20, 300, 1536, 512), MidTiles(2, 2, 2, 256, teams=1), dict(layers=2)),
        ((39, 136, 768), MidTiles(2, 2, 2, 128, teams=1), {}),
        ((57, 250, 1024), MidTiles(4, 2, 3, 128, cluster=True), dict(double=True, layers=2)),
    ],
)
def test_mid_body(monkeypatch, shape, tiles, kinds):
    check(monkeypatch, run_mid, shape, tiles, kinds)


# Rank and rows of each section; of one warp's step and of several, with warps to spare and without.
@pytest.mark.parametrize(
    "run, shape, tiles, kinds, rank, sections",
    [
        (run_decode, (1, 100, 1024), DecodeTiles(4, 1, 2), {}, 16, (100,)),
        (run_decode, (3, 224, 512), DecodeTiles(4, 2, 2), dict(layers=2), 6, (48, 16, 160)),
        (run_decode, (12, 37, 512), DecodeTiles(4, 1, 2, shared_x=True), {}, 72, (16, 21)),
        (run_mid, (20, 150, 1024), MidTiles(1, 2, 3, 128), dict(layers=2), 16, (32, 118)),
        (run_mid, (33, 40, 1024), MidTiles(2, 2, 2, 64), dict(dtype="float16"), 40, (40,)),
        (run_mid, (24, 300, 1536), MidTiles(7, 2, 2, 128), {}, 16, (300,)),
        (run_mid, (40, 72, 1024), MidTiles(4, 2, 2, 64, 4, True), {}, 40, (48, 24)),
        (run_mid, (100, 37, 1024), MidTiles(2, 1, 2, 64, 1, True), dict(layers=2), 16, (37,)),
    ],
)
def test_adapter_and_residual(monkeypatch, run, shape, tiles, kinds, rank, sections):
    m, n, k = shape
    (x, packed, scales, codebook, layer), weight = random_call(0, m, n, k, **kinds)
    problem, operands = describe(x, packed, scales, codebook, 64, layer)
    rng = np.random.default_rng(1)
    hidden, b, residual = (
        rng.standard_normal(shape, np.float32).astype(x.dtype)
        for shape in ((m, len(sections) * rank), (kinds.get("layers", 1), n, rank), (m, n))
    )
    problem = dataclasses.replace(problem, rank=rank, sections=sections, residual=True)
    last = b if layer is not None else b[-1]
    operands = operands._replace(adapter=(hidden, last), residual=(residual,))
    y = run(monkeypatch, problem, jax.tree.map(np.asarray, operands), tiles)
    y = y.astype(np.float64)
    x, hidden, b, residual = (np.asarray(a, np.float64) for a in (x, hidden, b[-1], residual))
    rows = np.arange(rank)[None] + rank * np.repeat(np.arange(len(sections)), sections)[:, None]
    term = np.einsum("mnr,nr->mn", hidden[:, rows], b) + residual
    want, spread = x @ weight.T, np.sqrt(x**2 @ (weight**2).T)
    # As below: the adapter's products are exact in float32, and the result is rounded once.
    u = 2.0**-9 if problem.dtype == "bfloat16" else 2.0**-12
    bound = 3 * u * np.linalg.norm(spread) + u * np.linalg.norm(want + term)
    assert np.linalg.norm(y - want - term) <= bound
    assert bound < 0.05 * np.linalg.norm(term)


@pytest.mark.parametrize(
    "run, tiles", [(run_decode, DecodeTiles(4, 2, 2)), (run_mid, MidTiles(2, 2, 2, 64))]
)
def test_a_part_of_a_double_quantized_weight(monkeypatch, run, tiles):
    (x, packed, scales, *rest), weight = random_call(0, 9, 190, 2048, double=True)
    row, block = 75, 13  # that it starts at, of 32 blocks in a row
    scales = scales._replace(
        codes=scales.codes[row:, block:], origin=jnp.array([row, block], jnp.int32), pitch=32
    )
    call = x[:, 64 * block :], packed[row:, 32 * block :], scales, *rest
    check_call(monkeypatch, run, call, weight[row:, 64 * block :], 64, tiles)


def check(monkeypatch, run, shape, tiles, kinds):
    m, n, k, block = (*shape, 64)[:4]
    call, weight = random_call(0, m, n, k, block, **kinds)
    check_call(monkeypatch, run, call, weight, block, tiles)


def check_call(monkeypatch, run, call, weight, block, tiles):
    x, packed, scales, codebook, layer = call
    problem, operands = describe(x, packed, scales, codebook, block, layer)
    y = run(monkeypatch, problem, jax.tree.map(np.asarray, operands), tiles)
    y = y.astype(np.float64)
    # The bound of `check_on_gpu`: roundings of each code, each scale and the result.
    u = 2.0**-9 if problem.dtype == "bfloat16" else 2.0**-12
    x = np.asarray(x, np.float64)
    want, spread = x @ weight.T, np.sqrt(x**2 @ (weight**2).T)
    assert np.linalg.norm(y - want) <= 3 * u * np.linalg.norm(spread) + u * np.linalg.norm(want)
