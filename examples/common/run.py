"""The shell of a trainer: its flags, its one-line errors, its files.

A trainer subclasses `Flags`, and hands that class and a function of it to `main`.
Results are written with `write_files`, all of them or none. `stop_signals` lets the
first Ctrl-C wait until the state is safe.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import tyro


class Failure(Exception):
    """What goes wrong for a reason that the user can mend, as one line."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


class Stopped(Exception):
    """The run was interrupted and its state is safe: one line says how to go on."""


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags that every trainer has."""

    out: Path = Path("out")
    """Directory for the results; it is made if need be."""
    quick: bool = False
    """A run of seconds, to see that everything works. Other flags still count."""
    resume: bool = False
    """Continue from the checkpoint in the output directory."""

    # Other defaults of `--quick`.
    QUICK: ClassVar[Mapping[str, Any]] = {}
    # Flags that may differ between a run and its resumption.
    FREE: ClassVar[frozenset[str]] = frozenset({"out", "quick", "resume"})

    def implied(self) -> Mapping[str, Any]:
        """Other defaults of flags, because of what was given for these."""
        return {}

    def check(self) -> None:
        """Raises a `Failure` that names the first flag whose value makes no sense."""

    def require(self, name: str, holds: bool, requirement: str) -> None:
        """Raises a `Failure` that flag `name` must be `requirement`, unless it is."""
        value = getattr(self, name)
        if not holds or (isinstance(value, float) and not math.isfinite(value)):
            flag = name.replace("_", "-")
            raise Failure(f"--{flag} must be {requirement}, got {value}", code=2)

    def fingerprint(self) -> dict[str, Any]:
        """The flags that decide the numbers, in a form that JSON returns unchanged."""
        values = dataclasses.asdict(self)
        kept = {name: values[name] for name in values if name not in self.FREE}
        return json.loads(json.dumps(kept, default=str))


@dataclasses.dataclass(frozen=True)
class ComparisonFlags(Flags):
    """The flags of a trainer that compares methods, each with several seeds."""

    data: str = "digits"
    """`digits`, or a directory with the four files of MNIST or Fashion-MNIST."""
    methods: tuple[str, ...] = ()
    """What is compared, in the order of the table."""
    seeds: int = 5
    """Number of seeds, all trained at once."""
    epochs: int = 24
    """Number of passes through the training set."""
    save_every: int = 10
    """Number of epochs between checkpoints; there is always one at the end."""

    QUICK: ClassVar = {"seeds": 2, "epochs": 3}
    FREE: ClassVar = Flags.FREE | {"data", "epochs", "save_every"}

    def check(self) -> None:
        super().check()
        self.require("methods", len(self.methods) > 0, "at least one")
        different = len(set(self.methods)) == len(self.methods)
        self.require("methods", different, "named once each")
        for name in ("seeds", "epochs", "save_every"):
            self.require(name, getattr(self, name) >= 1, "at least 1")


F = TypeVar("F", bound=Flags)


def main(
    kind: type[F],
    train: Callable[[F], None],
    leave: Callable[[int], NoReturn] = sys.exit,
) -> None:
    """Runs `train` on the flags of the command line, and leaves with its code.

    0: done. 1: failed. 2: the flags are wrong. 130: interrupted.
    """
    code, message = 0, ""
    try:
        flags = parse(kind, sys.argv[1:])
        train(flags)
    except Failure as error:
        code, message = error.code, f"error: {error}"
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code, message = 1, f"error: {where}{error.strerror or error}"
    except Stopped as error:
        code, message = 130, f"stopped: {error}"
    except KeyboardInterrupt:
        code, message = 130, "stopped: interrupted; the last checkpoint is kept"
    if message:
        print(" ".join(message.split()), file=sys.stderr)
    leave(code)


def parse(kind: type[F], arguments: Sequence[str]) -> F:
    """The flags on a command line; wrong ones are a `Failure` with exit code 2."""
    quick = kind.QUICK if "--quick" in arguments else {}

    def parsed(**defaults: Any) -> F:
        return tyro.cli(
            kind,
            args=list(arguments),
            default=kind(**{**defaults, **quick}),
            config=(tyro.conf.FlagCreatePairsOff,),
        )

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            # Only defaults change, so that what is given explicitly still wins.
            flags = parsed()
            flags = parsed(**flags.implied())
    except SystemExit as stop:
        if not stop.code:  # It was `--help`.
            raise
        raise Failure(_one_line(said.getvalue()), code=2) from None
    flags.check()
    return flags


def _one_line(box: str) -> str:
    """The first message in the box that tyro draws around its errors."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    ends = [i for i, line in enumerate(lines) if set(line) & set("─╰")]
    return " ".join(lines[: ends[0]] if ends else lines) + " (see --help)"


@contextlib.contextmanager
def output_directory(path: Path) -> Iterator[Path]:
    """Makes the directory, and takes it away again if the run leaves nothing in it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise Failure(f"--out: {path} is a file, not a directory") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise Failure(f"--out: {path} is not writable")
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.rmdir()  # Fails, as it should, unless the directory is empty.


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Writes every file or none: what stood there before survives a full disk.

    All contents reach the disk under other names first. Only then are they renamed,
    which needs no space and replaces each old file at once.
    """
    drafts = {name: directory / f".{name}.tmp" for name in files}
    try:
        for name, content in files.items():
            with open(drafts[name], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name, draft in drafts.items():
            os.replace(draft, directory / name)
    except OSError as error:
        reason = error.strerror or error
        raise Failure(
            f"{directory}: cannot write {' and '.join(files)}: {reason}"
        ) from error
    finally:
        for draft in drafts.values():
            with contextlib.suppress(OSError):
                draft.unlink()


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Lets the first Ctrl-C or `kill` wait to be asked for; a second is immediate."""
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, receive) for number in numbers]
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            # None: it was not Python that installed it.
            signal.signal(number, handler or signal.SIG_DFL)
