"""Few rows on a CPU: the tiles of `matmul.row_tiles` against float64, at the edges of a tile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import matmul
from pallas_kernels.matmul import row_tiles, xla

K, BLOCK = 96, 32


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(xla, "CPU_SMALL_WEIGHT", 0)
    monkeypatch.setattr(row_tiles, "TILE_WEIGHTS", 4 * K)  # 4 rows a tile


def problem(rows, m, transpose, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (rows, K))
    scales = rng.uniform(0.5, 1, (rows, K // BLOCK)).astype(np.float32)
    codebook = rng.standard_normal(16).astype(np.float32)
    packed = (codes[:, 0::2] << 4 | codes[:, 1::2]).astype(np.uint8)
    x = rng.standard_normal((m, rows if transpose else K)).astype(dtype)
    w = codebook.astype(np.float64)[codes] * np.repeat(scales.astype(np.float64), BLOCK, 1)
    want = x.astype(np.float64) @ (w if transpose else w.T)
    return tuple(map(jnp.asarray, (x, packed, scales, codebook))), want


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("rows", "m"), [(4, 1), (11, 3), (2, 5), (8, 128)])
def test_agrees_with_float64(rows, m, transpose):
    args, want = problem(rows, m, transpose)
    y = matmul(*args, block_size=BLOCK, transpose=transpose)
    # At most 96 float32 products of size up to about 8: 96 * 8 * 2^-24 < 1e-4.
    np.testing.assert_allclose(y, want, atol=1e-4)


def test_bfloat16_rounds_only_the_result():
    args, want = problem(11, 3, False, jnp.bfloat16)
    y = matmul(*args, block_size=BLOCK)
    assert y.dtype == jnp.bfloat16
    # bfloat16 has 8 bits; the sums are as above.
    np.testing.assert_allclose(np.asarray(y).astype(np.float64), want, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("transpose", [False, True])
def test_vmap_scan_and_grad(transpose):
    (x0, p0, s0, codebook), want0 = problem(11, 2, transpose)
    (x1, p1, s1, _), _ = problem(11, 2, transpose, seed=1)
    xs, ps, ss = jnp.stack([x0, x1]), jnp.stack([p0, p1]), jnp.stack([s0, s1])

    def one(x, p, s):
        return matmul(x, p, s, codebook, block_size=BLOCK, transpose=transpose)

    batched = jax.jit(jax.vmap(one))(xs, ps, ss)
    _, scanned = jax.lax.scan(lambda c, a: (c, one(*a)), None, (xs, ps, ss))
    np.testing.assert_allclose(batched[0], want0, atol=1e-4)  # as above
    np.testing.assert_allclose(scanned, batched, atol=1e-4)
    dx = jax.grad(lambda x: one(x, p0, s0).sum())(x0)
    back = matmul(
        jnp.ones(want0.shape), p0, s0, codebook, block_size=BLOCK, transpose=not transpose
    )
    np.testing.assert_allclose(dx, back, atol=1e-4)
