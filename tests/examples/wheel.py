"""Writes small wheels and `.ts` files, as PyPI and archives of series have them."""

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from common.wheels import Wheel


def write(
    folder: Path, members: Mapping[str, bytes], project: str = "some-data"
) -> Wheel:
    """A wheel that pip takes for one, in a folder, with these files in it."""
    stem = project.replace("-", "_")
    about = {
        "METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
        "RECORD": "",
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        for name, text in about.items():
            archive.writestr(f"{stem}-1.0.dist-info/{name}", text)
    return Wheel(project, "1.0", hashlib.sha256(path.read_bytes()).hexdigest())


def series(values: np.ndarray, labels: list[str], classes: list[str]) -> bytes:
    """A `.ts` file of these values, with the axes examples, channels and samples."""
    _, channels, samples = values.shape
    lines = [
        "# A comment, in Latin-1: \xb5V",
        "@problemName Some",
        "@univariate false",
        f"@dimensions {channels}",
        "@equalLength true",
        f"@seriesLength {samples}",
        f"@classLabel true {' '.join(classes)}",
        "@data",
    ]
    for example, label in zip(values, labels, strict=True):
        parts = [",".join(str(number) for number in channel) for channel in example]
        lines.append(":".join([*parts, label]))
    return ("\n".join(lines) + "\n").encode("latin-1")
