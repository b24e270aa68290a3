"""The checkpoint of a run: one file, with the state and what it was trained with.

It is NumPy's .npz, an archive of arrays under readable names with a checksum of each,
and it is replaced as a whole: an interrupted write leaves the one before.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.run import Failure, Flags, write_files


NAME = "checkpoint.npz"


class Checkpoint:
    """The newest state of training, in `checkpoint.npz` of the output directory.

    All that decides the numbers is kept beside the state: the flags, and `data`, which
    describes the data. A checkpoint that was written under other ones is refused.
    """

    def __init__(self, flags: Flags, data: Mapping[str, Any]):
        self._out = flags.out
        self._fingerprint = {**flags.fingerprint(), "data": dict(data)}
        if not flags.resume:
            # A new run: what an older one left must never be continued in its place.
            (self._out / NAME).unlink(missing_ok=True)

    def save(self, epoch: int, arrays: Mapping[str, ArrayLike]) -> None:
        """Keeps the arrays in place of those of an earlier epoch."""
        about = json.dumps({"epoch": epoch, "fingerprint": self._fingerprint})
        archive = io.BytesIO()
        np.savez(archive, about=np.array(about), **arrays)  # pyright: ignore[reportArgumentType]
        write_files(self._out, {NAME: archive.getvalue()})

    def restore(self) -> tuple[int, dict[str, NDArray[Any]]]:
        """The epoch and the arrays that were saved last."""
        path = self._out / NAME
        if not path.is_file():
            raise Failure(f"--resume: there is no {NAME} in {self._out}")
        try:
            with open(path, "rb") as file, np.load(file) as archive:
                arrays = dict(archive)
            about = json.loads(str(arrays.pop("about")))
            epoch, fingerprint = about["epoch"], about["fingerprint"]
        except (
            OSError,
            EOFError,
            KeyError,
            ValueError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise Failure(f"{path}: cannot be read: {error}") from error
        require_same(self._fingerprint, fingerprint, path)
        return epoch, arrays


def require_same(now: Mapping[str, Any], before: Mapping[str, Any], path: Path) -> None:
    """Raises a `Failure` that names the first thing that is not as it was in `path`."""
    for name, value in now.items():
        if before.get(name) != value:
            raise Failure(
                f"--resume: {name} is {value} now, but was {before.get(name)} in {path}"
            )
