"""The test environment: 8 CPU devices, and strict numerics for the layers that own numerics."""

import gc
import os
import pathlib

import pytest

TESTS = pathlib.Path(__file__).parent
# Optax itself fails under strict promotion, so the layers that call it are not in this list.
STRICT_FOLDERS = {"pallas_kernels", "core", "ops", "nn"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option for what CPU tests see of the kernels' side."""
    parser.addoption(
        "--as-if-h100",
        action="store_true",
        help="choose kernels as on one H100: they are traced, and XLA runs in their place",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Set what JAX reads at its import, before any test module imports it."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" not in flags:
        count = 1 if config.option.as_if_h100 else 8
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
    if not config.option.markexpr.startswith("gpu"):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")

    import hypothesis

    # The same examples in every run: a failure in CI is a failure at home.
    hypothesis.settings.register_profile("qjax", derandomize=True, deadline=None)
    hypothesis.settings.load_profile("qjax")


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported now stays: garbage collections pass it over, which saves a tenth."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def strict_numerics(request: pytest.FixtureRequest):
    """No implicit dtype or rank promotion under tests/{pallas_kernels,core,ops,nn}."""
    if request.path.relative_to(TESTS).parts[0] not in STRICT_FOLDERS:
        yield
        return
    import jax

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True)
def as_if_h100(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """With the option of this name, ops are dispatched as on one H100."""
    if request.config.option.as_if_h100:
        from pallas_kernels import dispatch

        h100 = dispatch.Target("gpu", "NVIDIA H100 80GB HBM3", dispatch.HOPPER)
        monkeypatch.setattr(dispatch, "target", lambda: h100)


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """The folder of golden data."""
    return TESTS / "golden"


@pytest.fixture
def rng():
    """A NumPy generator, the same in every test."""
    import numpy as np

    return np.random.default_rng(0)


@pytest.fixture
def key():
    """A JAX key, the same in every test."""
    import jax

    return jax.random.key(0)
