"""`examples/sharded.py` on one device, on eight and in two processes.

Every run is a child process, whose number of devices can be chosen.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import sharded
from common.mesh import share_of_a_device
from flags import QUICK, flags
from jax.sharding import NamedSharding, PartitionSpec as P
from trainer import Outcome, assert_one_line, run_of, strict_json


TRAINER = Path(__file__).parents[2] / "examples" / "sharded.py"
SIGNALLED = Path(__file__).with_name("signalled.py")
# Enough to learn in few steps, and a bound that half of all units begin above.
BOUND = 0.55
TINY = (
    *("--width", 16, "--depth", 2, "--heads", 4, "--length", 16, "--batch-size", 8),
    *("--learning-rate", 0.1, "--max-norm", BOUND, "--save-every", 4),
)
HALF, WHOLE = ("--steps", 4), ("--steps", 8)

Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def launch(compilation_cache: dict[str, str]) -> Iterator[Launch]:
    """Starts a trainer, `launch(*arguments, devices=1)`; none outlives the tests."""
    running = []

    def start(*arguments: object, devices: int = 1, script: object = (TRAINER,)):
        options = {
            "XLA_FLAGS": flags(devices, *QUICK),
            # Of a program that another process is just writing.
            "PYTHONWARNINGS": "ignore:Error reading persistent compilation cache",
        }
        child = subprocess.Popen(
            [sys.executable, *map(str, (*script, *TINY, *arguments))],
            env={**os.environ, **compilation_cache, **options},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(child)
        return child

    yield start
    for child in running:
        child.kill()
        child.communicate()


def outcome(child: subprocess.Popen[str]) -> Outcome:
    """Waits for a run to end."""
    out, err = child.communicate(timeout=200)
    # The process that compiles a program first may log what XLA thinks of it.
    return Outcome(child.returncode, out, re.sub(r"(?m)^[IW]\d{4} .*\n", "", err))


def results(out: Path, *children: subprocess.Popen[str]) -> dict[str, Any]:
    """What the run of these processes leaves in `out`."""
    outcomes = [outcome(child) for child in children]
    assert all(found.code == 0 for found in outcomes), outcomes
    return strict_json(out / "results.json")["results"]


def pair(launch: Launch, *arguments: object, second: tuple = (TRAINER,)):
    """Two processes of two devices each. `second` is the script of the second."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", 2)
    return [
        launch(*arguments, *together, "--process-id", i, devices=2, script=script)
        for i, script in enumerate([(TRAINER,), second])
    ]


def assert_close(losses: list[float], expected: list[float]) -> None:
    """Equal to rounding: sums in float32, whose order depends on the mesh, make up to
    3e-7 in eight steps. Another batch or lost moments make far more than 1e-5.
    """
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def runs(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The outputs of three undisturbed runs, made side by side.

    `alone` does all steps on one device, `halfway` half of them on eight; `projected`
    does these on two, with the bound in the optimiser.
    """
    out = tmp_path_factory.mktemp("runs")
    children = {
        "alone": launch(*WHOLE, "--out", out / "alone"),
        "halfway": launch(*HALF, "--out", out / "halfway", devices=8),
        "projected": launch(
            *(*HALF, "--enforce", "project", "--out", out / "projected"), devices=2
        ),
    }
    for name, child in children.items():
        results(out / name, child)
    return {name: out / name for name in children}


@pytest.fixture(scope="module")
def expected(runs: dict[str, Path]) -> list[float]:
    """The losses of one device."""
    return results(runs["alone"])["losses"]


def test_eight_devices_have_the_losses_of_one(
    runs: dict[str, Path], expected: list[float]
):
    found = results(runs["halfway"])
    assert found["mesh"] == {"data": 4, "model": 2}
    assert_close(found["losses"], expected[:4])


def test_a_device_holds_its_part_of_the_state_alone(runs: dict[str, Path]):
    # Of eight devices. Vectors, which are whole everywhere, add some percent.
    assert 1 / 8 < results(runs["halfway"])["share_of_a_device"] < 0.15


def test_the_share_of_a_device_counts_every_copy():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    place = lambda *axes: jax.device_put(np.ones((8, 8)), NamedSharding(mesh, P(*axes)))
    assert share_of_a_device([place("data", "model")]) == 1 / 8
    assert share_of_a_device([place("data"), place()]) == (1 / 4 + 1) / 2


@pytest.mark.parametrize("run", ["halfway", "projected"])
def test_the_bound_is_reached_and_kept(runs: dict[str, Path], run: str):
    norm = results(runs[run])["largest_unit_norm"]
    assert BOUND * (1 - 1e-5) <= norm <= BOUND


@pytest.mark.parametrize(("devices", "model_axis"), [(8, 4), (1, 1)])
def test_a_checkpoint_goes_on_on_another_mesh(
    launch: Launch,
    runs: dict[str, Path],
    expected: list[float],
    tmp_path: Path,
    devices: int,
    model_axis: int,
):
    out = shutil.copytree(runs["halfway"], tmp_path / "out")
    arguments = (*WHOLE, "--resume", "--model-axis", model_axis, "--out", out)
    found = results(out, launch(*arguments, devices=devices))
    assert found["mesh"] == {"data": devices // model_axis, "model": model_axis}
    assert_close(found["losses"], expected)


def test_two_processes_have_the_losses_of_one(
    launch: Launch, expected: list[float], tmp_path: Path
):
    found = results(tmp_path, *pair(launch, *WHOLE, "--out", tmp_path))
    assert found["processes"] == 2 and found["mesh"] == {"data": 2, "model": 2}
    assert_close(found["losses"], expected)


def test_a_run_goes_on_after_one_of_its_two_processes_was_killed(
    launch: Launch, expected: list[float], tmp_path: Path
):
    killed = (SIGNALLED, "SIGKILL", 6)
    first, second = pair(launch, *WHOLE, "--out", tmp_path, second=killed)
    assert outcome(second).code == -signal.SIGKILL
    assert_one_line(outcome(first), "process 0 is left alone")
    assert [step.name for step in (tmp_path / "checkpoints").iterdir()] == ["4"]
    again = pair(launch, *WHOLE, "--resume", "--out", tmp_path)
    assert_close(results(tmp_path, *again)["losses"], expected)


def test_a_signal_to_one_process_stops_both_after_the_same_step(
    launch: Launch, tmp_path: Path
):
    stopped = (SIGNALLED, "SIGTERM", 3)
    children = pair(launch, *WHOLE, "--out", tmp_path, second=stopped)
    for found in map(outcome, children):
        assert found.code == 130
        assert found.err == "stopped: 3 of 8 steps are done; --resume goes on\n"
    assert [step.name for step in (tmp_path / "checkpoints").iterdir()] == ["3"]


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (("--model-axis", 3), "--model-axis must be a divisor of 8", 2),
        (("--num-processes", 2), "--coordinator must be HOST:PORT, got None", 2),
        (("--resume", "--seed", 1), "--resume: seed is 1 now, but was 0", 1),
    ],
)
def test_what_does_not_fit_is_one_clear_line(
    runs: dict[str, Path], arguments, message: str, code: int
):
    given = (*TINY, *WHOLE, "--out", runs["halfway"], *arguments)
    ended = run_of(sharded.ShardedFlags, sharded.train, *given)
    assert_one_line(ended, message, code)
    assert (runs["halfway"] / "checkpoints" / "4").is_dir()
