"""Text that every machine has: the source of Python's standard library, as bytes."""

import dataclasses
import functools
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Int
from numpy.typing import NDArray

from common.data import checksum
from common.run import Failure


@dataclasses.dataclass(frozen=True)
class Text:
    """A text cut into windows, which are read in another order in every pass."""

    name: str
    content: NDArray[np.uint8]
    # The number of bytes to predict in a window, which has one more to begin with.
    length: int
    # Decides the order of the windows.
    seed: int

    def windows(self, positions: NDArray[Any]) -> NDArray[np.int32]:
        """The windows at these positions in the endless order of training.

        They depend on the position and the seed alone, so that any process can read
        any of them, and a resumed run goes on where it stopped.
        """
        count = (len(self.content) - 1) // self.length
        passes, places = np.divmod(positions, count)
        orders = (_order(self.seed, number, count) for number in passes.tolist())
        first = [order[i] for order, i in zip(orders, places, strict=True)]
        offsets = np.arange(self.length + 1)
        rows = self.content[self.length * np.array(first)[:, None] + offsets]
        return rows.astype(np.int32)

    def batch(
        self, position: int, size: int, sharding: Sharding
    ) -> Int[Array, "size length+1"]:
        """The windows from a position on, laid out as `sharding` says.

        A process reads those of its own devices, and no others.
        """
        positions = np.arange(position, position + size)

        def read(index: tuple[slice, ...] | None) -> NDArray[np.int32]:
            return self.windows(positions[index[0] if index else slice(None)])

        shape = (size, self.length + 1)
        return jax.make_array_from_callback(shape, sharding, read)

    def describe(self) -> dict[str, Any]:
        """Name, size, and a checksum that differs if any byte does."""
        size, found = len(self.content), checksum(self.content)
        return {"name": self.name, "bytes": size, "checksum": found}


@functools.lru_cache(maxsize=2)
def _order(seed: int, number: int, count: int) -> NDArray[np.int64]:
    """The order of the windows in the pass of this number."""
    return np.random.default_rng((seed, number)).permutation(count)


def load(source: str, length: int, seed: int) -> Text:
    """The text that `--data` names: `stdlib`, or a file."""
    content = read(source)
    if len(content) <= length:
        raise Failure(f"--data: {source} has {len(content)} bytes, too few to train on")
    return Text(Path(source).name, content, length, seed)


def read(source: str) -> NDArray[np.uint8]:
    """All bytes of the text that `--data` names, in the same order on all machines."""
    if source == "stdlib":
        directory = Path(sysconfig.get_path("stdlib"))
        files = sorted(directory.glob("*.py"))
    else:
        files = [Path(source)]
        if not files[0].is_file():
            raise Failure(f"--data: {source} is not a file (nor is it `stdlib`)")
    content = b"".join(file.read_bytes() for file in files)
    return np.frombuffer(content, np.uint8)


class Parts(NamedTuple):
    """Windows of a text, one a row: of one byte more than are predicted."""

    train: NDArray[np.uint8]
    validation: NDArray[np.uint8]
    test: NDArray[np.uint8]


def parts(source: str, length: int, count: int) -> tuple[dict[str, Any], Parts]:
    """What the text is, and its windows: the first eight tenths to train on, the next
    to tune with, and of the last the test. Of these two there are `count` windows, as
    far from each other as they can be."""
    content = read(source)
    tenth = len(content) // 10
    if tenth <= length * count:
        least = 10 * (length * count + 1)
        raise Failure(f"--data: {source} has {len(content)} bytes; {least} are needed")
    pieces = np.split(content[: 10 * tenth], [8 * tenth, 9 * tenth])
    windows = [np.lib.stride_tricks.sliding_window_view(p, length + 1) for p in pieces]
    starts = np.linspace(0, tenth - length - 1, count).astype(int)
    held = (np.ascontiguousarray(each[starts]) for each in windows[1:])
    about = Text(Path(source).name, content, length, 0).describe()
    return about, Parts(np.ascontiguousarray(windows[0][::length]), *held)
