"""Writes small data sets in the form of MNIST's four files."""

import gzip
import struct
from pathlib import Path

import numpy as np


def content(array: np.ndarray) -> bytes:
    """An array of bytes in the IDX format."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write(directory: Path, *, compress: bool, train: int = 60, test: int = 20) -> None:
    """Four files of random 6×5 images with all labels in turn."""
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        images = generator.integers(0, 256, (count, 6, 5))
        for kind, array in (("images", images), ("labels", np.arange(count) % 10)):
            name = f"{part}-{kind}-idx{array.ndim}-ubyte"
            data = content(array)
            if compress:
                (directory / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (directory / name).write_bytes(data)
