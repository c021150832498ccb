"""The built wheel: what it holds, that it imports alone, and that an import touches no device."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

import qjax

pytestmark = pytest.mark.process

ROOT = pathlib.Path(__file__).parent.parent


def run(*args: str, **env: str) -> str:
    """Run Python with these arguments outside the repository and return what it printed."""
    done = subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT))
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_both_packages_and_nothing_else(wheel):
    names = set(wheel.namelist())
    roots = {name.split("/")[0] for name in names}
    assert {"qjax", "pallas_kernels"} == {root for root in roots if not root.endswith(".dist-info")}
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in ("qjax", "pallas_kernels")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources <= names
    assert {"qjax/py.typed", "pallas_kernels/py.typed"} <= names


def test_wheel_metadata(wheel):
    (metadata,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
    text = wheel.read(metadata).decode()
    assert "\nName: qjax-quant\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    assert f"\nVersion: {qjax.__version__}\n" in text
    for extra in ("cuda12", "cuda13", "tpu", "hf", "gguf", "plots", "dev"):
        assert f"\nProvides-Extra: {extra}\n" in text


def test_wheel_imports_alone_and_touches_no_device(wheel, tmp_path):
    wheel.extractall(tmp_path)
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in wheel.namelist()
        # A kernel backend may need a GPU plugin to import; dispatch imports it on use.
        if name.endswith(".py") and not name.split("/")[-1].startswith(("mosaic", "triton"))
    )
    # -P: not the working directory. The wheel goes before any editable install of the repository.
    code = (
        f"import sys, importlib; sys.path.insert(0, {str(tmp_path)!r})\n"
        f"for name in {modules!r}:\n"
        f"    file = importlib.import_module(name).__file__\n"
        f"    assert file.startswith({str(tmp_path)!r}), file\n"
        "print('ok')"
    )
    # No such platform exists: the first touch of a device would raise.
    printed = run("-P", "-W", "error", "-c", code, JAX_PLATFORMS="no_such_platform")
    assert printed.strip() == "ok"


def test_the_platform_trick_catches_a_device_touch():
    done = subprocess.run(
        [sys.executable, "-c", "import jax.numpy as jnp; jnp.zeros(3)"],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "no_such_platform"},
    )
    assert done.returncode != 0
    assert "no_such_platform" in done.stderr
