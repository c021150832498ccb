"""`qjax tune` without a GPU: a timer that is told the times, and the file that dispatch reads."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from pallas_kernels import dispatch, matmul, tune, user_tiles
from pallas_kernels.matmul import mosaic_gpu
from pallas_kernels.matmul.config import DecodeTiles, MidTiles
from pallas_kernels.matmul.config_large import LargeTiles
from pallas_kernels.user_tiles import Choice, Key
from qjax.cli import app
from tests.pallas_kernels.problems import H100, decoded, lower

KIND = H100.device_kind
KEY = Key(m=8, n=4096, k=4096, block_size=64, dtype="bfloat16")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("QJAX_CACHE", str(tmp_path))
    user_tiles.forget()
    yield tmp_path / "matmul.json"
    user_tiles.forget()


@pytest.fixture
def on_h100():
    """As if traced for an H100."""
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=H100)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def arguments(m, n=4096, k=4096, dtype="bfloat16"):
    shape = jax.ShapeDtypeStruct
    x, packed = shape((m, k), dtype), shape((n, k // 2), jnp.uint8)
    return x, packed, shape((n, k // 64), jnp.float32), shape((16,), jnp.float32)


def test_choices_come_back_as_they_were_written(cache):
    choices = {
        KEY: Choice("mosaic_gpu", DecodeTiles(8, 2, 3), 7.5),
        dataclasses.replace(KEY, m=512): Choice("mosaic_large", LargeTiles(128, 8, 0), 50.0),
        dataclasses.replace(KEY, m=8192, transpose=True): Choice("decoded", None, 390.0),
    }
    assert user_tiles.add(KIND, choices) == cache
    for key, choice in choices.items():
        assert user_tiles.lookup(KIND, key) == choice
    # Added to, not written over.
    user_tiles.add("another GPU", {KEY: Choice("triton", None, 20.0)})
    assert user_tiles.lookup(KIND, KEY) == choices[KEY]
    assert user_tiles.lookup("another GPU", KEY).backend == "triton"


def test_rows_between_measured_ones_take_the_next_within_twice_as_many():
    user_tiles.add(KIND, {KEY: Choice("mosaic_gpu", DecodeTiles(8), 7.5)})
    found = {m: user_tiles.lookup(KIND, dataclasses.replace(KEY, m=m)) for m in range(1, 12)}
    assert [m for m, choice in found.items() if choice] == [5, 6, 7, 8]
    for change in (dict(n=1), dict(dtype="float16"), dict(double=True), dict(transpose=True)):
        assert user_tiles.lookup(KIND, dataclasses.replace(KEY, **change)) is None
    assert user_tiles.lookup("another GPU", KEY) is None


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda report: report | {"format": 2}, "its format is 2, not 1"),
        (lambda report: report | {"kernels": "0"}, "measured with other kernels; run `qjax tune`"),
        (lambda report: {}, "KeyError: 'format'"),
        (lambda report: report | {"devices": []}, "AttributeError"),
        (lambda report: "{", "AttributeError|TypeError"),
    ],
)
def test_a_file_that_does_not_fit_is_left_aside(cache, edit, message):
    user_tiles.add(KIND, {KEY: Choice("mosaic_gpu", DecodeTiles(8), 7.5)})
    cache.write_text(json.dumps(edit(json.loads(cache.read_text()))))
    user_tiles.forget()
    with pytest.warns(UserWarning, match=message):
        assert user_tiles.lookup(KIND, KEY) is None
    assert user_tiles.lookup(KIND, KEY) is None  # warned once


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"backend": "cublas"}, "backend is 'cublas'"),
        ({"tiles": {"type": "WideTiles"}}, "KeyError: 'WideTiles'"),
        ({"tiles": {"type": "DecodeTiles", "warps": -1}}, "DecodeTiles.warps is -1"),
        ({"tiles": {"type": "DecodeTiles", "warps": "8"}}, "DecodeTiles.warps is '8'"),
        ({"tiles": {"type": "DecodeTiles", "lanes": 4}}, "lanes"),
        ({"tiles": []}, "TypeError"),
    ],
)
def test_a_broken_choice_is_named(cache, choice, message):
    user_tiles.add(KIND, {KEY: Choice("mosaic_gpu", DecodeTiles(8), 7.5)})
    report = json.loads(cache.read_text())
    report["devices"][KIND][0]["choice"] |= choice
    cache.write_text(json.dumps(report))
    user_tiles.forget()
    with pytest.warns(UserWarning, match=f"{cache.name} are not used: .*{message}"):
        assert user_tiles.lookup(KIND, KEY) is None


def test_fields_that_a_file_lacks_have_their_defaults(cache):
    key = dataclasses.replace(KEY, m=32)
    user_tiles.add(KIND, {key: Choice("mosaic_gpu", MidTiles(64, teams=2, cluster=False), 7.5)})
    report = json.loads(cache.read_text())
    for name in ("teams", "cluster"):
        del report["devices"][KIND][0]["choice"]["tiles"][name]
    cache.write_text(json.dumps(report))
    user_tiles.forget()
    assert user_tiles.lookup(KIND, key).tiles == MidTiles(64)


def test_half_a_file_is_left_aside(cache):
    cache.write_text('{"format": 1,')
    with pytest.warns(UserWarning, match="it cannot be read"):
        assert user_tiles.lookup(KIND, KEY) is None


def test_without_the_variable_the_folder_is_that_of_the_platform(monkeypatch, tmp_path):
    monkeypatch.delenv("QJAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_tiles.path() == tmp_path / "qjax" / "matmul.json"


def test_dispatch_takes_what_was_measured(on_h100):
    user_tiles.add(KIND, {KEY: Choice("decoded", None, 1.0)})
    resolve = dispatch.resolve
    assert resolve("matmul", None, *arguments(8), block_size=64).backend.name == "decoded"
    assert resolve("matmul", None, *arguments(9), block_size=64).backend.name == "mosaic_gpu"
    # A named implementation runs: the measured one is another.
    named = resolve("matmul", "mosaic_gpu", *arguments(8), block_size=64)
    assert named.backend.name == "mosaic_gpu" and named.measured is None
    text = dispatch.explain("matmul", *arguments(8), block_size=64)
    assert "the fastest measured by `qjax tune`: 1.0 us" in text


def test_measured_tiles_reach_the_kernel(monkeypatch):
    tiles, given = DecodeTiles(8, 1, 2), []

    def spy(*args, config=None, kernel=mosaic_gpu.matmul, **options):
        given.append(config)
        return kernel(*args, config=config, **options)

    monkeypatch.setattr(mosaic_gpu, "matmul", spy)
    user_tiles.add(KIND, {KEY: Choice("mosaic_gpu", tiles, 1.0)})
    text = lower(functools.partial(matmul, block_size=64), *arguments(8))
    assert "qjax_matmul_decode" in text
    assert given == [tiles]


def test_candidates_are_those_that_can_run(on_h100):
    few = list(tune.candidates(KEY, limit=3))
    assert [name for name, _ in few].count("mosaic_gpu") == 3
    assert len({tiles for name, tiles in few if name == "mosaic_gpu"}) == 3
    assert ("decoded", None) in few and ("xla", None) in few
    back = {name for name, _ in tune.candidates(dataclasses.replace(KEY, transpose=True), 3)}
    assert back == {"mosaic_large", "decoded", "xla"}


SMALL = Key(m=3, n=16, k=128, block_size=64, dtype="float32")


def test_the_fastest_is_the_one_the_timer_says(monkeypatch):
    both = [("xla", None), ("xla", DecodeTiles(4))]
    monkeypatch.setattr(tune, "candidates", lambda key, limit: both)
    monkeypatch.setattr(
        tune, "_compile", lambda key, *rest, make=tune._compile: make(key, "xla", None)
    )
    times = iter([9.0, 4.0])
    [(key, found)] = tune.measure([SMALL], timer=lambda *_: next(times))
    assert key == SMALL
    assert [(choice.tiles, choice.us) for choice in found] == [(DecodeTiles(4), 4.0), (None, 9.0)]


def test_a_wrong_result_is_refused(monkeypatch):
    def wrong(key, backend, tiles, make=tune._compile):
        compiled = make(key, "xla", None)
        return compiled if tiles is None else lambda *a: [1.1 * y for y in compiled(*a)]

    monkeypatch.setattr(tune, "candidates", lambda key, limit: [("xla", DecodeTiles(4))])
    monkeypatch.setattr(tune, "_compile", wrong)
    with pytest.raises(RuntimeError, match=r"xla with DecodeTiles.*is wrong.*error 0\.1$"):
        list(tune.measure([SMALL], timer=lambda *_: 1.0))


@pytest.mark.parametrize("double", [False, True])
def test_the_measured_product_is_the_product(double):
    key = dataclasses.replace(SMALL, double=double)
    xs, weights = tune._arrays(key)
    y = tune._compile(key, "xla", None)(xs, weights)[-1]
    codebook = np.linspace(-1, 1, 16)
    w = decoded(*weights[-1], 64, codebook=codebook)
    # float32 sums of 128 products of size about 1.
    np.testing.assert_allclose(y, np.asarray(xs[-1]).astype(np.float64) @ w.T, atol=1e-4)


@pytest.mark.parametrize(
    "words, message",
    [
        (["4096"], "'4096' is not INxOUT, such as 4096x14336"),
        (["100x64"], "100x64: blocks of 64 do not divide 100 inputs"),
        (["4096x64", "--rows", "1,x"], "--rows is '1,x'"),
        (["4096x64", "--dtype", "int8"], "--dtype is 'int8'"),
    ],
)
def test_arguments_that_name_nothing(words, message, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["tune", *words])
    assert result.exit_code == 2 and message in result.output


def test_without_a_gpu_the_command_says_so():
    result = CliRunner().invoke(app, ["tune", "128x64"])
    assert result.exit_code == 1 and "needs an NVIDIA GPU, and this is cpu" in result.output


def test_the_command_writes_what_dispatch_reads(monkeypatch, on_h100):
    best = Choice("mosaic_gpu", DecodeTiles(8, 1, 2), 5.0)
    monkeypatch.setattr(
        tune, "measure", lambda keys, limit: ((k, [best, Choice("xla", None, 9.0)]) for k in keys)
    )
    result = CliRunner().invoke(app, ["tune", "4096x4096", "--rows", "8"])
    assert result.exit_code == 0, result.output
    choice = dispatch.resolve("matmul", None, *arguments(8), block_size=64)
    assert choice.measured == best
