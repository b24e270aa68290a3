"""Labelled series of several channels, such as recordings, and the `.ts` files in which
archives of them are kept.

Everything is checked before a number of it is trained on, so that a file that was cut
off is one clear line and not a strange result.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from common.data import checksum
from common.run import Failure


class Part(NamedTuple):
    """Some series, all of one length, and the number of the class of each."""

    values: NDArray[np.float32]  # examples, channels, samples
    labels: NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class Series:
    """What to train and what to test on."""

    name: str
    classes: tuple[str, ...]
    train: Part
    test: Part

    def __post_init__(self) -> None:
        train, test = (part.values.shape[1:] for part in (self.train, self.test))
        if train != test:
            raise Failure(
                f"{self.name}: a training example has {train[0]} channels of "
                f"{train[1]} samples, a test example {test[0]} of {test[1]}"
            )

    def describe(self) -> dict[str, Any]:
        """Name, sizes, and a checksum that differs if any number or label does."""
        _, channels, samples = self.train.values.shape
        return {
            "name": self.name,
            "training_examples": len(self.train.labels),
            "test_examples": len(self.test.labels),
            "channels": channels,
            "samples": samples,
            "classes": len(self.classes),
            "checksum": checksum(*self.train, *self.test),
        }

    def standardised(self) -> "Series":
        """With mean 0 and variance 1 in each channel, over the training examples."""
        mean = self.train.values.mean(axis=(0, 2), keepdims=True, dtype=np.float64)
        deviation = self.train.values.std(axis=(0, 2), keepdims=True, dtype=np.float64)
        # A channel that is the same all the time stays zero.
        scale = np.where(deviation > 0, deviation, 1)

        def scaled(part: Part) -> Part:
            return Part(((part.values - mean) / scale).astype(np.float32), part.labels)

        return dataclasses.replace(
            self, train=scaled(self.train), test=scaled(self.test)
        )

    def averaged(self, count: int) -> "Series":
        """With the mean of `count` samples in place of them; a rest is left out."""
        samples = self.train.values.shape[2] // count

        def shorter(part: Part) -> Part:
            kept = part.values[:, :, : samples * count]
            parts = kept.reshape(*kept.shape[:2], samples, count)
            return Part(parts.mean(axis=3), part.labels)

        return dataclasses.replace(
            self, train=shorter(self.train), test=shorter(self.test)
        )

    def held_out(self, share: float, seed: int) -> "Series":
        """The training examples alone, of which this share is tested on: for tuning,
        to which the test examples are closed."""
        train, test = split(self.train, share, seed, self.name)
        return dataclasses.replace(self, train=train, test=test)


def split(part: Part, share: float, seed: int, name: str) -> tuple[Part, Part]:
    """Two parts with the same mix of classes, of which the second has this share."""
    try:
        rest, chosen = train_test_split(
            np.arange(len(part.labels)),
            test_size=share,
            random_state=seed,
            stratify=part.labels,
        )
    except ValueError as error:
        raise Failure(f"{name}: cannot be split in two: {error}") from error
    first, second = (Part(part.values[i], part.labels[i]) for i in (rest, chosen))
    return first, second


def read_ts(content: bytes, name: str) -> tuple[tuple[str, ...], Part]:
    """The names of the classes, and the series, in a `.ts` file.

    Lines that begin with `#` are comments and those with `@` the header, up to `@data`.
    Then each line is an example: its channels, and its class, between colons.
    """
    lines = content.decode("utf-8", errors="replace").splitlines()
    header: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("@"):
            word, *given = line[1:].split() or [""]
            header[word.lower()] = given
            if word.lower() == "data":
                break
    if "data" not in header:
        raise Failure(f"{name}: cut off within its header: there is no @data")
    if header.get("classlabel", ["false"])[0] != "true":
        raise Failure(f"{name}: its header names no classes")
    if header.get("equallength", ["true"])[0] != "true":
        raise Failure(f"{name}: its series are of different lengths")
    classes = tuple(header["classlabel"][1:])
    numbers = {label: i for i, label in enumerate(classes)}
    values, labels = [], []
    body = False
    for number, line in enumerate(lines, 1):
        if not body or not line.strip():
            body = body or line.strip().lower() == "@data"
            continue
        *channels, label = line.strip().split(":")
        if label not in numbers:
            raise Failure(
                f"{name}, line {number}: cut off, or not of a class: it ends in "
                f"{label[-20:]!r}"
            )
        try:
            values.append(np.array([c.split(",") for c in channels], np.float32))
        except ValueError:
            raise Failure(
                f"{name}, line {number}: not a rectangle of numbers"
            ) from None
        labels.append(numbers[label])
        shape = values[-1].shape
        if shape != values[0].shape:
            raise Failure(
                f"{name}, line {number}: its shape is {shape}, and "
                f"{values[0].shape} before"
            )
        if not np.isfinite(values[-1]).all():
            raise Failure(f"{name}, line {number}: holds what is not finite")
    if not values:
        raise Failure(f"{name}: holds no series")
    expected = header.get("serieslength"), header.get("dimensions")
    for says, found in zip(expected, values[0].shape[::-1], strict=True):
        if says and says != [str(found)]:
            raise Failure(f"{name}: its header promises {says[0]}, but {found} follow")
    return classes, Part(np.stack(values), np.array(labels, np.int32))
