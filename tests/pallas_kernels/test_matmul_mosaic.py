"""The Hopper matmul kernels: choice of tiles, lowering for CUDA anywhere, and results on a GPU."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.matmul import mid_layout, mosaic_gpu, tuned
from pallas_kernels.matmul.config import DecodeTiles, MidTiles, decode_candidates, mid_candidates
from pallas_kernels.matmul.problem import Problem
from pallas_kernels.scales import DoubleQuantScales

H100 = jax.sharding.AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
)
# QLoRA's NF4 to 4 digits: the kernels take any 16 values.
NEGATIVE = (-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911)
POSITIVE = (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1)
NF4 = np.array([*NEGATIVE, 0, *POSITIVE], np.float32)


def abstract_arguments(m, n, k, block, *, double=False, layers=None, dtype="bfloat16"):
    """Shapes of (x, packed, scales, codebook, layer)."""
    shape, lead = jax.ShapeDtypeStruct, () if layers is None else (layers,)
    scales = shape((*lead, n, k // block), jnp.float32)
    if double:
        scales = DoubleQuantScales(
            codes=shape((*lead, n, k // block), jnp.uint8),
            absmax=shape((*lead, -(-n * k // block // 256)), jnp.float32),
            offset=shape(lead, jnp.float32),
            table=shape((256,), jnp.float32),
        )
    layer = None if layers is None else shape((), jnp.int32)
    packed = shape((*lead, n, k // 2), jnp.uint8)
    return shape((m, k), dtype), packed, scales, shape((16,), jnp.float32), layer


def lower(m, n, k, block=64, config=None, **kinds) -> str:
    """The module of one call, lowered for an H100 on this machine."""

    def call(x, packed, scales, codebook, layer):
        return mosaic_gpu.matmul(
            x, packed, scales, codebook, block_size=block, layer=layer, config=config
        )

    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=H100)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(call).trace(*abstract_arguments(m, n, k, block, **kinds))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


# Both kernels, every kind of scales, dtype and stack, and the shapes that no tile divides.
SHAPES = [
    ((1, 14336, 4096), {}),
    ((5, 1001, 96), dict(block=32)),
    ((16, 4095, 2880), dict(double=True)),
    ((8, 4096, 11008), dict(layers=3, double=True)),
    ((3, 515, 8192), dict(block=4096, dtype="float16")),
    ((17, 37, 11008), {}),
    ((40, 131, 96), dict(block=32)),
    ((64, 515, 3072), dict(layers=3)),
    ((100, 515, 2880), dict(double=True, layers=3)),
    ((128, 4096, 13824), dict(dtype="float16")),
]


@pytest.mark.parametrize("shape, kinds", SHAPES)
def test_lowers_for_cuda(shape, kinds):
    text = lower(*shape, **kinds)
    # At 9 to 16 rows of few weights `mosaic_decode` is the faster.
    assert ("qjax_matmul_decode" if shape[0] <= 16 else "qjax_matmul_mid") in text
    # A slice of a stack is read in place.
    assert "dynamic_slice" not in text and "gather" not in text


@pytest.mark.parametrize("key", tuned.TABLE[H100.device_kind])
def test_measured_tiles_lower(key):
    tiles = tuned.TABLE[H100.device_kind][key]
    assert tuned.lookup(H100.device_kind, *key) == tiles
    assert "qjax_matmul" in lower(*key, config=tiles)


def test_tiles_of_a_range_of_rows():
    lookup = functools.partial(tuned.lookup, H100.device_kind)
    assert lookup(5, 14336, 4096) == lookup(8, 14336, 4096)
    assert lookup(1, 14337, 4096) is None
    assert tuned.lookup("another GPU", 1, 14336, 4096) is None


def test_every_shape_has_tiles_that_fit():
    rows = (1, 8, 9, 16, 17, 40, 72, 104, 128)
    for m, n, block, double in itertools.product(
        rows, (1, 37, 4096, 128256), (32, 64, 512, 4096), (False, True)
    ):
        for k in {block, -(-2880 // block) * block, -(-28672 // block) * block}:
            groups = -(-n * k // block // 256)
            problem = Problem(m, n, k, block, "bfloat16", False, double, k // block, groups)
            tiles = mosaic_gpu.choose(problem, "another GPU", 132)
            # Of long K, x fits in `mosaic_decode` as far as it is of few rows.
            decode = m == 1 or (m <= 8 and k < 2**14)
            kinds = (DecodeTiles,) if decode else (MidTiles,) if m > 16 else (DecodeTiles, MidTiles)
            assert isinstance(tiles, kinds)


def test_tiles_that_do_not_fit_are_refused_when_lowered():
    # `choose` relies on `shared_bytes` agreeing with the limit that the lowering enforces.
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        lower(8, 4096, 4096, config=DecodeTiles(16, 1, 5))
    lower(8, 4096, 4096, config=DecodeTiles(16, 1, 4))
    assert mosaic.SHARED_BYTES < 232448  # the limit, less a byte that the compiler takes


# Microseconds on an H100 by blocks, teams and whether they are clusters (`benchmarks/NOTES.md`).
MEASURED_MID = {
    (32, 1024, 4096): {(64, 2, False): 6.94, (64, 4, True): 5.33, (64, 2, True): 5.83},
    (64, 1024, 4096): {(64, 2, False): 9.28, (64, 4, True): 5.87, (80, 4, True): 6.42},
    (128, 1024, 4096): {(64, 2, False): 13.81, (64, 4, True): 7.93, (64, 2, True): 8.69},
    (64, 1024, 8192): {(64, 2, False): 11.6, (64, 4, True): 8.59, (96, 4, True): 8.91},
    (32, 2048, 1024): {(64, 4, True): 4.14, (32, 4, False): 4.3, (64, 2, False): 5.82},
    (64, 2048, 1024): {(64, 4, True): 4.72, (32, 4, False): 5.17, (64, 2, True): 4.87},
    (64, 2560, 9728): {(132, 2, False): 17.01, (80, 2, True): 14.98, (80, 4, True): 15.27},
    (64, 2880, 4096): {(90, 4, True): 8.61, (92, 2, False): 10.46},
    (128, 2880, 4096): {(90, 4, True): 12.06, (92, 2, True): 11.74},
    (64, 4096, 2880): {(128, 4, True): 8.64, (128, 2, False): 10.47},
    (32, 4096, 4096): {(128, 2, False): 9.05, (128, 4, True): 8.1, (96, 2, True): 9.2},
    (64, 4096, 4096): {(128, 2, False): 11.14, (128, 4, True): 9.54, (96, 2, True): 11.05},
    (120, 4096, 4096): {(128, 4, True): 11.92, (96, 2, True): 14.64},
    (128, 4096, 4096): {(128, 2, False): 16.61, (128, 4, True): 13.11, (96, 2, True): 15.11},
    (64, 4096, 11008): {(128, 2, False): 19.23, (128, 4, True): 19.29},
    (128, 4096, 14336): {(132, 2, False): 35.34, (128, 4, True): 32.45},
    (64, 5120, 2880): {(120, 2, False): 11.12, (80, 4, False): 10.64, (80, 2, True): 10.64},
    (64, 5120, 5120): {(120, 2, False): 14.71, (80, 2, True): 14.9, (80, 4, False): 15.24},
    (128, 5120, 5120): {(120, 2, False): 20.48, (80, 2, True): 20.6, (80, 4, False): 22.33},
    (64, 5120, 13824): {(120, 2, False): 26.29, (120, 2, True): 44.26},
    (16, 6144, 4096): {(132, 2, False): 10.45, (96, 2, True): 9.71},
    (64, 6144, 4096): {(96, 2, True): 12.79, (96, 4, False): 13.31, (96, 1, True): 14.15},
    (128, 6144, 4096): {(96, 2, True): 17.65, (96, 4, False): 19.17, (132, 2, False): 21.84},
    (64, 8192, 8192): {(128, 2, False): 23.65, (128, 2, True): 22.36, (128, 4, False): 26.32},
    (128, 11008, 4096): {(132, 2, False): 28.85, (86, 1, True): 29.77},
    (32, 14336, 4096): {(112, 2, False): 17.33, (112, 1, True): 17.99},
    (128, 14336, 4096): {(112, 2, False): 32.54, (112, 1, True): 30.22, (112, 1, False): 34.33},
    (128, 32000, 4096): {(125, 1, False): 54.07, (125, 2, False): 66.24},
    (32, 28672, 8192): {(112, 2, False): 59.37, (132, 2, False): 57.10},
}


@pytest.mark.parametrize("shape", MEASURED_MID)
def test_estimated_tiles_are_near_the_best_measured(shape):
    times = MEASURED_MID[shape]
    tiles = mid_candidates(*shape, 64, 132)[0]
    # Runs of one kernel differ by 3 %; for 2 more no shape has a constant of its own.
    assert times[tiles.blocks, tiles.teams, tiles.cluster] <= 1.05 * min(times.values())


# Microseconds on an H100 by (M, N, K) and tiles (`benchmarks/NOTES.md`).
MEASURED_DECODE = {
    (1, 4096, 14336): {(16, 2): 15.2, (16, 1, 2, True): 14.7, (8, 1, 3, True): 14.2},
    (4, 4096, 14336): {(16, 2): 15.8, (12, 1, 2, True): 16.1, (8, 1, 3, True): 15.7},
    (8, 4096, 14336): {(16, 2): 15.7, (8, 2, 2, True): 17.8},
    (1, 4096, 4096): {(16, 1): 6.1, (8, 2): 6.1, (12, 2): 7.2},
    (8, 4096, 4096): {(16, 1): 6.5, (8, 2): 6.4},
    (1, 1024, 4096): {(16, 1): 3.4, (8, 2): 3.0},
    (1, 4096, 11008): {(12, 2): 11.6, (16, 1, 2, True): 12.0},
    (4, 4096, 11008): {(12, 2): 12.0, (8, 2, 3, True): 12.5, (16, 1, 2, True): 14.5},
    (1, 5120, 13824): {(16, 2): 17.5, (8, 1, 3, True): 18.3},
    (1, 5120, 5120): {(12, 2): 8.3, (12, 1, 2, True): 9.0},
    (8, 8192, 8192): {(16, 2): 16.8, (16, 1): 17.8, (8, 2, 3): 17.9},
    (1, 11008, 4096): {(8, 2): 11.8, (16, 1): 12.2},
    (4, 4096, 2880): {(12, 1): 5.2, (8, 2): 5.7},
    (1, 3072, 1024): {(4, 1): 2.7, (4, 2): 3.7},
    (8, 1024, 2048): {(8, 1): 2.8, (4, 2): 2.9},
}


@pytest.mark.parametrize("shape", MEASURED_DECODE)
def test_estimated_slabs_are_near_the_best_measured(shape):
    times = {DecodeTiles(*tiles): us for tiles, us in MEASURED_DECODE[shape].items()}
    chosen = decode_candidates(*shape, 64, 132)[0]
    assert times[chosen] <= 1.03 * min(times.values())  # runs of one kernel differ by that much


# Microseconds on an H100 at 16 rows: `mosaic_decode`, `mosaic_mid` (`benchmarks/NOTES.md`).
MEASURED_KERNELS = {
    (14336, 4096): (16.83, 15.9),
    (4096, 4096): (7.21, 7.49),
    (1024, 4096): (4.10, 5.11),
    (1024, 8192): (6.08, 6.89),
    (2048, 1024): (3.50, 5.36),
    (4096, 2880): (6.30, 7.13),
    (4096, 2560): (6.54, 7.66),
    (2880, 4096): (6.17, 7.82),
    (5120, 5120): (9.95, 10.83),
    (11008, 4096): (13.54, 15.1),
    (6144, 4096): (9.10, 9.71),
    (8192, 8192): (18.28, 17.05),
}


@pytest.mark.parametrize("shape", MEASURED_KERNELS)
def test_kernel_of_16_rows_is_the_faster(shape):
    n, k = shape
    times = dict(zip((DecodeTiles, MidTiles), MEASURED_KERNELS[shape]))
    problem = Problem(16, n, k, 64, "bfloat16")
    tiles = mosaic_gpu.choose(problem, H100.device_kind, 132)
    # Runs of one kernel differ by 3 %.
    assert times[type(tiles)] <= 1.03 * min(times.values())
    both = {type(tiles) for tiles in mosaic_gpu.candidates(problem)[:4]}  # for `tune`
    assert both == {DecodeTiles, MidTiles}


def test_shares_cover_the_work_in_order():
    for shape, blocks in itertools.product([(1024, 4096), (2880, 2880), (37, 11008)], (1, 7, 132)):
        problem = Problem(40, *shape, 64, "bfloat16")
        layout = mid_layout.Layout(problem, MidTiles(blocks))
        shares = [range(layout.begin(b), layout.begin(b + 1)) for b in range(layout.blocks)]
        assert [p for share in shares for p in share] == list(range(layout.total))
        assert all(layout.share_of(p) == b for b, share in enumerate(shares) for p in share)


# Tiles of every number of teams, clusters of several sizes, blocks of several tiles.
DIVISIONS = [
    ((40, 515, 3072), MidTiles(9, 2, 2, 128, teams=4), dict(double=True)),
    ((47, 515, 3072), MidTiles(9, 2, 3, 64, teams=4), dict(dtype="float16")),
    ((64, 1024, 4096), MidTiles(64, 2, 2, 64, teams=4, cluster=True), {}),
    ((24, 515, 4096), MidTiles(18, 2, 2, 128, teams=4, cluster=True), dict(layers=2)),
    ((120, 512, 2880), MidTiles(24, 2, 2, 64, teams=4, cluster=True), {}),
    ((127, 136, 4096), MidTiles(12, 1, 2, 64, teams=4, cluster=True), dict(double=True)),
    ((88, 512, 4096), MidTiles(16, 2, 2, 64, teams=4, cluster=True), {}),
    ((9, 4096, 4096), MidTiles(128, 2, 2, 256, teams=4, cluster=True), dict(double=True)),
    ((128, 1000, 4096), MidTiles(64, 2, 2, 64, cluster=True), dict(double=True)),
    ((50, 1024, 2880), MidTiles(40, 2, 2, 128, cluster=True), dict(dtype="float16")),
    ((128, 520, 4096), MidTiles(6, 2, 2, 128, teams=1, cluster=True), {}),
    ((66, 515, 4096), MidTiles(12, 2, 2, 64, teams=1, cluster=True), dict(double=True)),
    ((100, 512, 2880), MidTiles(2, 2, 2, 128, teams=1), {}),
    ((70, 512, 2880), MidTiles(6, 2, 2, 128, teams=1), dict(dtype="float16")),
    ((20, 2048, 1024), MidTiles(8, 2, 2, 256), {}),
]


@pytest.mark.parametrize("shape, tiles, kinds", DIVISIONS)
def test_divisions_lower(shape, tiles, kinds):
    assert "qjax_matmul_mid" in lower(*shape, config=tiles, **kinds)


@pytest.mark.parametrize(
    "tiles, message",
    [
        (MidTiles(8, teams=3), "teams is 3; it must be 1, 2 or 4"),
        (MidTiles(12, teams=4), "blocks is 12; with 4 teams it must be a multiple of the 8 tiles"),
        (MidTiles(6, cluster=True), "at most 8, of the 4 tiles"),
        (MidTiles(40, cluster=True), "at most 8, of the 4 tiles"),
    ],
)
def test_tiles_that_do_not_divide_the_work_are_named(tiles, message):
    with pytest.raises(ValueError, match=message):
        lower(20, 512, 4096, config=tiles)


def test_unsupported_says_why():
    x, packed, scales, codebook, _ = abstract_arguments(4, 64, 128, 64)
    why = functools.partial(mosaic_gpu.unsupported, packed=packed, block_size=64)
    assert why(x) is None
    assert "float32" in why(jax.ShapeDtypeStruct((4, 128), jnp.float32))
    assert "M <= 128" in why(jax.ShapeDtypeStruct((129, 128), jnp.bfloat16))
    assert "transpose" in why(x, transpose=True)
    assert "48" in mosaic_gpu.unsupported(x, packed, block_size=48)
    with pytest.raises(NotImplementedError, match="transpose"):
        mosaic_gpu.matmul(x, packed, scales, codebook, block_size=64, transpose=True)


# On a GPU


def random_call(seed, m, n, k, block=64, *, double=False, dtype="bfloat16", layers=None):
    """(x, packed, scales, codebook, layer) and the float64 weight that they stand for."""
    rng = np.random.default_rng(seed)
    count, blocks = layers or 1, k // block
    x = rng.standard_normal((m, k), np.float32).astype(jnp.dtype(dtype))
    packed = rng.integers(0, 256, (count, n, k // 2), np.uint8)
    if double:
        codes = rng.integers(0, 256, (count, n, blocks), np.uint8)
        absmax = rng.uniform(0.01, 0.04, (count, -(-n * blocks // 256))).astype(np.float32)
        offset = rng.uniform(0.05, 0.07, count).astype(np.float32)
        table = rng.uniform(-1, 1, 256).astype(np.float32)
        groups = np.arange(n * blocks).reshape(n, blocks) // 256
        decoded = table[codes[-1]] * absmax[-1][groups] + offset[-1]
        scales = DoubleQuantScales(codes, absmax, offset, table)
        if not layers:
            scales = DoubleQuantScales(codes[0], absmax[0], offset[0], table)
    else:
        stack = rng.uniform(0.02, 0.1, (count, n, blocks)).astype(np.float32)
        decoded, scales = stack[-1], stack if layers else stack[0]
    codes = np.stack([packed[-1] >> 4, packed[-1] & 15], -1).reshape(n, blocks, block)
    weight = (NF4.astype(np.float64)[codes] * decoded[..., None]).reshape(n, k)
    layer = None if layers is None else np.int32(layers - 1)
    packed = packed if layers else packed[0]
    return jax.tree.map(jnp.asarray, (x, packed, scales, NF4, layer)), weight


def check_on_gpu(seed, m, n, k, block=64, config=None, **kinds):
    arguments, weight = random_call(seed, m, n, k, block, **kinds)
    x = np.asarray(arguments[0], np.float64)

    # The donated poison becomes the output's buffer.
    @functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
    def call(poison, x, packed, scales, codebook, layer):
        return mosaic_gpu.matmul(
            x, packed, scales, codebook, block_size=block, layer=layer, config=config
        )

    def run():
        return np.asarray(call(jnp.full((m, n), jnp.nan, arguments[0].dtype), *arguments))

    y = run()
    assert y.dtype == arguments[0].dtype
    np.testing.assert_array_equal(run(), y)
    # Independent roundings of each code, each scale (M > 16) and the result, each of relative
    # size u at most (mean square u^2 / 3): 3 u of the root sum of squares is 3 standard deviations
    # of all three at once, for a single result too.
    u = 2.0**-9 if y.dtype == jnp.bfloat16 else 2.0**-12
    want, error = x @ weight.T, y.astype(np.float64) - x @ weight.T
    spread = np.sqrt(x**2 @ (weight**2).T)
    assert np.linalg.norm(error) <= 3 * u * np.linalg.norm(spread) + u * np.linalg.norm(want)


@pytest.mark.gpu
@pytest.mark.parametrize("shape, kinds", SHAPES)
def test_equals_float64(shape, kinds):
    check_on_gpu(0, *shape, **kinds)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 32, 33, 64, 65, 96, 128])
def test_equals_float64_for_each_number_of_rows(m):
    check_on_gpu(m, m, 1024, 4096)


@pytest.mark.gpu
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("m", [3, 40])
def test_equals_float64_for_each_block_size(m, block, double):
    check_on_gpu(block, m, 515, 8192 if block > 1024 else 3072, block, double=double)


@pytest.mark.gpu
@pytest.mark.parametrize("shape, tiles, kinds", DIVISIONS)
def test_divisions_equal_float64(shape, tiles, kinds):
    check_on_gpu(0, *shape, config=tiles, **kinds)


@pytest.mark.gpu
@pytest.mark.parametrize("key", tuned.TABLE[H100.device_kind])
def test_measured_tiles_equal_float64(key):
    check_on_gpu(0, *key, config=tuned.TABLE[H100.device_kind][key])


# Blocks of a cluster, with more row tiles than clusters and fewer.
SLABS = [
    DecodeTiles(4, 2, 2),
    DecodeTiles(12, 2, 3),
    DecodeTiles(8, 2, 3, shared_x=True),
    DecodeTiles(4, 3, 2),
    DecodeTiles(8, 4, 2, together=False),
]


@pytest.mark.gpu
@pytest.mark.parametrize("n", [300, 9003])
@pytest.mark.parametrize("tiles", SLABS, ids=str)
def test_slabs_equal_float64(tiles, n):
    check_on_gpu(n, 7, n, 2880, config=tiles, double=n > 1000, layers=2)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(200))
def test_equals_float64_on_random_shapes(seed):
    rng = np.random.default_rng(seed)
    block = int(rng.choice([32, 64, 64, 64, 128, 256, 512, 1024, 2048, 4096]))
    m, n = int(rng.integers(1, 129)), int(rng.integers(1, 3000))
    k = block * int(rng.integers(1, max(2, 9000 // block)))
    kinds = dict(double=bool(rng.random() < 0.4), layers=(None, None, 2)[rng.integers(3)])
    check_on_gpu(seed, m, n, k, block, dtype=("bfloat16", "float16")[rng.integers(2)], **kinds)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [2, 20])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_rows_stay_in_their_row(m, value):
    (x, packed, scales, codebook, _), weight = random_call(0, m, 300, 512)
    x = x.at[1, 77].set(value)
    y = np.asarray(mosaic_gpu.matmul(x, packed, scales, codebook, block_size=64), np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf
        want = np.asarray(x, np.float64) @ weight.T
    np.testing.assert_array_equal(np.isfinite(y), np.isfinite(want))
