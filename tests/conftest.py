"""The test environment: 8 CPU devices, and strict numerics for the layers that own numerics."""

import gc
import os
import pathlib

import pytest

TESTS = pathlib.Path(__file__).parent
# Optax itself fails under strict promotion, so the layers that call it are not in this list.
STRICT_FOLDERS = {"pallas_kernels", "core", "ops", "nn"}


def pytest_configure(config: pytest.Config) -> None:
    """Set what JAX reads at its import, before any test module imports it."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
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
