"""Examples in docstrings run and print what they say; public names are documented."""

import doctest
import importlib
import pkgutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
import qjax

# What an example may use without importing it.
NAMES = {"jax": jax, "jnp": jnp, "np": np, "qjax": qjax, "pallas_kernels": pallas_kernels}
PUBLIC = {
    name: value
    for name, value in vars(qjax).items()
    if not name.startswith("_") and not isinstance(value, types.ModuleType)
}
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules():
    """All modules but the kernel backends, some of which need a GPU plugin to import."""
    for package in (pallas_kernels, qjax):
        yield package
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not info.name.split(".")[-1].startswith(("mosaic", "triton")):
                yield importlib.import_module(info.name)


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [
        test
        for module in modules()
        # A module's own names come before qjax's: pallas_kernels has a matmul too.
        for test in finder.find(module, globs=PUBLIC | NAMES | vars(module))
        if test.examples
    ]
    return sorted(found, key=lambda test: test.name)


@pytest.mark.parametrize("example", examples(), ids=lambda test: test.name)
def test_example(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may write files
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=report.append)
    assert result.failed == 0, "".join(report)


def test_public_names_are_documented():
    assert [name for name, value in PUBLIC.items() if not value.__doc__] == []


def test_there_are_examples():
    assert len(examples()) > 10
