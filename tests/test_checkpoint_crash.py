"""Writes that end in the middle: the old checkpoint stays, and no half of the new one loads."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

import qjax

ROOT = pathlib.Path(__file__).parent.parent
OLD, NEW = {"w": jnp.zeros(2048)}, {"w": jnp.ones(2048), "v": jnp.ones(3)}


def run(code: str, path: pathlib.Path) -> subprocess.CompletedProcess:
    """Run code in a process of its own, which has `save()` to write NEW over `path`."""
    start = f"""
        import os, pathlib, shutil, signal, sys
        import jax, jax.numpy as jnp, numpy as np
        import qjax

        path = pathlib.Path({str(path)!r})

        def save(**kwargs):
            x = {{"w": np.ones(2048, np.float32), "v": np.ones(3, np.float32)}}
            qjax.save(path, x, overwrite=path.exists(), **kwargs)

        def die_at(event, end, count):
            # Kill the process at the count-th event on a path that ends so.
            def hook(name, args):
                nonlocal count
                if name == event and str(args[0]).endswith(end):
                    count -= 1
                    if count == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(hook)
        """
    code = textwrap.dedent(start) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        timeout=300,
    )


def assert_holds(path, expected):
    loaded = qjax.load(path)
    assert sorted(loaded) == sorted(expected)
    assert all(np.array_equal(loaded[name], expected[name]) for name in expected)


# Where the process dies: as Orbax writes its files, at its rename, at our two, and as the old
# checkpoint is deleted.
DEATHS = {
    "orbax metadata": ("open", "state/_METADATA", 1),
    "qjax metadata": ("open", "_CHECKPOINT_METADATA", 1),
    "orbax commits": ("os.rename", "", 1),
    "old goes away": ("os.rename", "", 2),
    "new comes": ("os.rename", "", 3),
    "old is deleted": ("os.rmdir", "", 1),
}


@pytest.mark.process
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_save_leaves_the_old_checkpoint(death, tmp_path):
    path = tmp_path / "x"
    qjax.save(path, OLD)
    done = run(f"die_at{DEATHS[death]}\nsave()", path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if path.exists():
        assert_holds(path, NEW if death == "old is deleted" else OLD)
    else:
        with pytest.raises(FileNotFoundError, match=r"ended early and left .*x\.qjax-old"):
            qjax.load(path)
        assert_holds(tmp_path / "x.qjax-old", OLD)
    assert path.exists() == (death != "new comes")
    # The next save is not stopped by what was left.
    qjax.save(path, NEW, overwrite=path.exists())
    qjax.save(path, OLD, overwrite=True)
    assert_holds(path, OLD)
    assert [folder.name for folder in tmp_path.iterdir()] == ["x"]


@pytest.mark.process
@pytest.mark.parametrize("death", ["orbax metadata", "qjax metadata", "orbax commits"])
def test_a_killed_first_save_leaves_nothing_at_the_path(death, tmp_path):
    path = tmp_path / "x"
    done = run(f"die_at{DEATHS[death]}\nsave()", path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        qjax.load(path)
    for folder in tmp_path.iterdir() if death != "orbax commits" else ():
        with pytest.raises(ValueError, match=r"not a complete|no qjax metadata"):
            qjax.load(folder)
    qjax.save(path, NEW)
    assert_holds(path, NEW)


@pytest.mark.process
@pytest.mark.parametrize("call", ["save", "save_async"])
def test_a_full_disk(call, tmp_path):
    """With a limit on the size of files, standing for a full disk, the save fails and cleans up."""
    path = tmp_path / "x"
    qjax.save(path, OLD)
    code = f"""
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        x = {{"w": np.random.default_rng(0).normal(size=(1 << 20,)).astype(np.float32)}}
        for target, overwrite in ((path, True), (path.with_name("y"), False)):
            try:
                pending = qjax.{call}(target, x, overwrite=overwrite)
                if pending is not None:
                    pending.result()
            except Exception as error:
                print("refused", type(error).__name__)
        print(sorted(p.name for p in path.parent.iterdir()))
        """
    done = run(code, path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused") == 2, done.stdout
    assert done.stdout.splitlines()[-1] == "['x']"
    assert_holds(path, OLD)


@pytest.mark.process
def test_another_process_loads_what_was_saved(tmp_path):
    path = tmp_path / "x"
    done = run("save()", path)
    assert done.returncode == 0, done.stderr
    assert_holds(path, NEW)
