"""Real images without a download: scikit-learn's digits, or MNIST's four IDX files.

Everything is checked before a byte of it is trained on, so that a file that was cut off
or mixed up with another is one clear line and not a strange result.
"""

import dataclasses
import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from common.run import Failure


CLASSES = 10
# The type code of unsigned bytes, the only type that MNIST's files use.
_UNSIGNED_BYTE = 0x08


def checksum(*arrays: NDArray[Any]) -> str:
    """Eight digits that differ if any number does."""
    found = 0
    for array in arrays:
        found = zlib.crc32(array.tobytes(), found)
    return f"{found:08x}"


@dataclasses.dataclass(frozen=True)
class Images:
    """Flat images with entries in [0, 1], and their labels, split into two sets."""

    name: str
    train_images: NDArray[np.float32]
    train_labels: NDArray[np.int32]
    test_images: NDArray[np.float32]
    test_labels: NDArray[np.int32]

    @property
    def features(self) -> int:
        """The number of pixels of one image."""
        return self.train_images.shape[1]

    def describe(self) -> dict[str, Any]:
        """Name, sizes, and a checksum that differs if any pixel or label does."""
        arrays = [getattr(self, field.name) for field in dataclasses.fields(self)[1:]]
        return {
            "name": self.name,
            "training_images": len(self.train_labels),
            "test_images": len(self.test_labels),
            "checksum": checksum(*arrays),
        }


def with_random_labels(images: Images, share: float, seed: int) -> Images:
    """The same images, with a share of the training labels drawn anew at random: one in
    ten of these is right all the same. Test labels stay."""
    labels = partly_random(images.train_labels, share, seed)
    return dataclasses.replace(images, train_labels=labels)


def partly_random(
    labels: NDArray[np.int32], share: float, seed: int
) -> NDArray[np.int32]:
    """The same labels, with a share of them drawn anew at random."""
    rng = np.random.default_rng(seed)
    labels = labels.copy()
    chosen = rng.permutation(len(labels))[: round(share * len(labels))]
    labels[chosen] = rng.integers(CLASSES, size=len(chosen), dtype=labels.dtype)
    return labels


def load(source: str, split_seed: int) -> Images:
    """The data that `--data` names: `digits`, or a directory of four IDX files."""
    return digits(split_seed) if source == "digits" else idx_directory(Path(source))


def digits(split_seed: int) -> Images:
    """The 1,797 handwritten digits of scikit-learn, three quarters to train on."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        (images / 16).astype(np.float32),
        labels.astype(np.int32),
        test_size=0.25,
        random_state=split_seed,
        stratify=labels,
    )
    train_images, test_images, train_labels, test_labels = map(np.asarray, parts)
    return Images("digits", train_images, train_labels, test_images, test_labels)


def idx_directory(directory: Path) -> Images:
    """MNIST, or a data set in its form, from the four files of its distribution."""
    if not directory.is_dir():
        raise Failure(f"--data: {directory} is not a directory (nor is it `digits`)")
    train_images, train_labels = _idx_pair(directory, "train")
    test_images, test_labels = _idx_pair(directory, "t10k")
    if train_images.shape[1] != test_images.shape[1]:
        raise Failure(
            f"{directory}: a training image has {train_images.shape[1]} pixels, "
            f"a test image {test_images.shape[1]}"
        )
    name = directory.resolve().name
    return Images(name, train_images, train_labels, test_images, test_labels)


def _idx_pair(
    directory: Path, part: str
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """The images and the labels of one part, `train` or `t10k`."""
    image_file = _find(directory, f"{part}-images", "idx3-ubyte")
    label_file = _find(directory, f"{part}-labels", "idx1-ubyte")
    images, labels = read_idx(image_file, rank=3), read_idx(label_file, rank=1)
    if len(images) != len(labels):
        raise Failure(
            f"{directory}: {len(images)} images in {image_file.name} "
            f"but {len(labels)} labels in {label_file.name}"
        )
    if labels.max() >= CLASSES:
        raise Failure(
            f"{label_file}: label {labels.max()} is out of range, "
            f"labels are 0 to {CLASSES - 1}"
        )
    flat = np.divide(images.reshape(len(images), -1), 255, dtype=np.float32)
    return flat, labels.astype(np.int32)


def _find(directory: Path, stem: str, kind: str) -> Path:
    """The file under either of the two names in use, plain or compressed."""
    names = [f"{stem}{dot}{kind}{end}" for end in ("", ".gz") for dot in "-."]
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise Failure(f"{directory}: there is no {names[0]} here, nor {names[0]}.gz")


def read_idx(path: Path, rank: int) -> NDArray[np.uint8]:
    """The array of unsigned bytes with `rank` axes in an IDX file, plain or .gz.

    The format is two zero bytes, a type code, the number of axes, their lengths as
    big-endian 32-bit integers, and then exactly as many bytes as these say.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise Failure(f"{path}: cannot be read: {reason}") from error
    start = 4 + 4 * rank
    if len(data) < start:
        raise Failure(f"{path}: cut off within its header")
    magic, *shape = struct.unpack_from(f">{1 + rank}I", data)
    expected = _UNSIGNED_BYTE << 8 | rank
    if magic != expected:
        raise Failure(
            f"{path}: not an IDX file of {rank} axes of unsigned bytes: it begins "
            f"with {magic:#010x} in place of {expected:#010x}"
        )
    size, found = math.prod(shape), len(data) - start
    if size == 0:
        raise Failure(f"{path}: holds nothing, its shape is {tuple(shape)}")
    if found != size:
        raise Failure(
            f"{path}: {'cut off' if found < size else 'too long'}: its header promises "
            f"{size:,} bytes of data, {found:,} follow"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
