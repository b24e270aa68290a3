"""A model that two processes share, with two devices each, has the numbers of one.

What each of them does is in `process.py`.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import process
import pytest
from flags import QUICK, flags
from tables import assert_close


pytestmark = pytest.mark.usefixtures("quick_compilation")

Arrays = dict[str, np.ndarray]


def start(number: int, port: int, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, process.__file__, f"127.0.0.1:{port}", str(number), str(out)],
        env={**os.environ, "XLA_FLAGS": flags(2, *QUICK)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outcome(child: subprocess.Popen[str]) -> tuple[int, str]:
    """How it ended, and what it printed. It may wait for another that is gone."""
    try:
        printed, _ = child.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        child.kill()
        printed, _ = child.communicate()
    return child.returncode, printed


class Found(NamedTuple):
    """Arrays by name; a name has several, with a number after it."""

    alone: Arrays
    """Of one process with one device."""
    shared: list[Arrays]
    """Of each of the two."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, quick_compilation) -> Found:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tmp_path_factory.mktemp("processes")
    paths = [out / f"{number}.npz" for number in range(2)]
    children = [start(number, port, path) for number, path in enumerate(paths)]
    try:
        alone = process.arrays(process.numbers())
        outcomes = list(map(outcome, children))
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    return Found(alone, [dict(np.load(path)) for path in paths])


DONE = (
    *("training", *process.PENALTIES, "project_params"),
    *("metrics", "report", "stack_report"),
)


@pytest.mark.parametrize("done", DONE)
def test_two_processes_have_the_numbers_of_one(found: Found, done: str):
    """Sums in float32, whose order depends on the mesh, make up to 3e-6 of the largest
    entry, and 3e-5 in the gradient of a distance to a set, which is a difference of
    numbers that are nearly the same.
    """
    expected = {k: a for k, a in found.alone.items() if k.startswith(f"{done} ")}
    assert expected
    for shared in found.shared:
        for name, array in expected.items():
            assert_close(shared[name], array, 1e-4)


def test_each_process_has_half_of_each_weight(found: Found):
    shares = {k for k in found.alone if k.startswith("shares ")}
    assert len(shares) == 3
    assert all(shared[name] == 0.5 for shared in found.shared for name in shares)
