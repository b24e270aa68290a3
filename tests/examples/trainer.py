"""Runs a trainer within the test process, and reads what it leaves behind."""

import contextlib
import csv
import io
import json
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import digits
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common.arm import Arm
from common.loop import named_leaves
from common.run import main


class Outcome(NamedTuple):
    """The exit code of a run and what it printed."""

    code: int
    out: str
    err: str


def run(*arguments: object) -> Outcome:
    """Runs `examples/digits.py` with these arguments."""
    return run_of(digits.DigitsFlags, digits.train, *arguments)


def run_of(kind: type, train: Callable, *arguments: object) -> Outcome:
    """Runs the trainer with these flags, with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trainer.py", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with pytest.raises(SystemExit) as caught:
                main(kind, train)
    return Outcome(caught.value.code or 0, out.getvalue(), err.getvalue())


def completed(run: Callable[..., Outcome], out: Path, *arguments: object) -> Path:
    """The output directory of a run that went well and said nothing of errors."""
    outcome = run("--out", out, *arguments)
    assert outcome.code == 0 and outcome.err == ""
    return out


def assert_left(out: Path) -> None:
    """The run left its four files, and no others."""
    names = sorted(path.name for path in out.iterdir())
    assert names == ["checkpoint.npz", "figure.png", "metrics.csv", "results.json"]


def assert_one_line(outcome: Outcome, message: str, code: int = 1) -> None:
    """The run failed, and said so in one line on standard error."""
    assert outcome.code == code
    assert outcome.err.count("\n") == 1 and outcome.err.startswith("error: ")
    assert message in outcome.err


def strict_json(path: Path) -> Any:
    """What a JSON file holds; NaN and Infinity, which are not JSON, are an error."""

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


def rows(out: Path) -> list[dict[str, str]]:
    """The lines of metrics.csv."""
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def numbers(out: Path) -> Any:
    """All that has to be the same whenever a run is repeated: everything but time."""
    methods = strict_json(out / "results.json")["methods"]
    for method in methods.values():
        method.pop("seconds")
    lines = rows(out)
    for line in lines:
        line.pop("seconds")
    return methods, lines


def saved_arrays(out: Path) -> dict[str, np.ndarray]:
    """The arrays in the checkpoint, by name."""
    with np.load(out / "checkpoint.npz") as archive:
        return dict(archive)


def saved_state(arm: Arm, out: Path) -> Any:
    """The state of an arm in the checkpoint."""
    saved = saved_arrays(out)
    named = named_leaves(arm.name, arm.start)
    leaves = [jnp.asarray(saved[name], leaf.dtype) for name, leaf in named.items()]
    return jax.tree.unflatten(jax.tree.structure(arm.start), leaves)


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: fails as a full disk does, in any library.

    Python ignores the signal that comes with it, so writing is an ordinary error.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
