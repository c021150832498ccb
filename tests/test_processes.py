"""Two processes of four devices train one model; one is killed, and both are started again."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.multi_process import last_save

ROOT = pathlib.Path(__file__).parent.parent
TIMEOUT = 240  # seconds for what takes 40 on two idle cores


class Run:
    """A process of `tests.multi_process` and what it prints."""

    def __init__(self, log: pathlib.Path, devices: int, *arguments: str):
        self.log = log
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        command = [sys.executable, "-m", "tests.multi_process", *arguments]
        with log.open("w") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            text = self.log.read_text()[-3000:]
            assert self.process.poll() in (None, 0) and time.monotonic() < deadline, text
            time.sleep(0.1)

    def is_done(self) -> bool:
        return "done" in self.log.read_text()

    def losses(self) -> dict[int, float]:
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return {int(s[0]): float(s[1]) for s in lines if len(s) == 2 and s[0].isdigit()}

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def start_cluster(folder: pathlib.Path, steps: int, name: str) -> list[Run]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    logs = [folder.parent / f"{name}-{i}.log" for i in range(2)]
    arguments = str(folder), str(steps), address
    return [Run(log, 4, *arguments, str(i), "2") for i, log in enumerate(logs)]


@pytest.mark.process
@pytest.mark.timeout(900)
def test_a_cluster_goes_on_after_one_process_was_killed(tmp_path):
    folder, alone = tmp_path / "saves", tmp_path / "alone"
    folder.mkdir()
    alone.mkdir()
    runs: list[Run] = []
    try:
        first = start_cluster(folder, 1000, "first")
        runs += first
        first[0].wait_until(lambda: last_save(folder) and len(first[0].losses()) > 3)
        first[1].kill()
        first[0].kill()  # it cannot go on alone: it waits for the other, until it is told
        before, saved = first[0].losses(), last_save(folder)

        steps = saved + 4
        second = start_cluster(folder, steps, "second")
        runs += second
        for run in second:
            run.wait_until(run.is_done)
        after = second[0].losses()
        assert after == second[1].losses()
        assert list(after) == list(range(saved, steps))

        # One process with eight devices that was never stopped.
        whole = Run(tmp_path / "whole.log", 8, str(alone), str(min(steps, 12)))
        runs.append(whole)
        whole.wait_until(whole.is_done)
        expected = whole.losses()
    finally:
        for run in runs:
            run.kill()
    # The same programs on the same shards; the sums between processes in another order: 1e-5.
    for found, other in ((before, expected), (after, expected), (after, before)):
        common = sorted(set(found) & set(other))
        values = [[losses[step] for step in common] for losses in (found, other)]
        np.testing.assert_allclose(*values, rtol=1e-5)
    assert min(before) == 0 and len(set(before) & set(expected)) > 3
    assert expected[max(expected)] < expected[0]
