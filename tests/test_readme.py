"""The README's Python blocks run in order, its files exist, and its numbers are measured ones."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) >= 2


@pytest.mark.slow
def test_python_blocks_run(tmp_path, monkeypatch):
    """One after the other in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for number, block in enumerate(BLOCKS, 1):
        exec(compile(block, f"README.md block {number}", "exec"), namespace)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_map_names_what_exists():
    layout = README.split("## Layout")[1].split("\n## ")[0]
    named = re.findall(r"`([\w./]+(?:/|\.py))`", layout)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_versions_are_those_of_the_project():
    """The README's oldest versions are pyproject.toml's lower bounds."""
    project = (ROOT / "pyproject.toml").read_text()
    for name in ("jax", "flax", "optax", "orbax-checkpoint"):
        bound = re.search(rf'"{name}>=([\d.]+)"', project)
        assert bound is not None
        assert f"{name} {bound[1]}" in README
