"""Reading images: what is read, and one clear line for everything that is wrong."""

import gzip
from pathlib import Path

import idx
import numpy as np
import pytest
from common.data import digits, load, read_idx
from common.run import Failure


TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def test_digits_are_split_once_and_for_all():
    images = digits(split_seed=0)
    assert images.train_images.shape == (1347, 64)
    assert images.test_images.shape == (450, 64)
    assert images.train_images.min() == 0 and images.train_images.max() == 1
    assert images.describe() == digits(split_seed=0).describe()
    assert images.describe() != digits(split_seed=1).describe()


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_are_read_as_they_were_written(tmp_path: Path, compress: bool):
    idx.write(tmp_path, compress=compress)
    images = load(str(tmp_path), split_seed=0)
    expected = np.random.default_rng(0).integers(0, 256, (60, 6, 5))
    np.testing.assert_array_equal(
        np.rint(images.train_images * 255), expected.reshape(60, 30)
    )
    assert images.test_labels.tolist() == 2 * list(range(10))


def test_names_with_a_dot_are_found_too(tmp_path: Path):
    idx.write(tmp_path, compress=False)
    for file in list(tmp_path.iterdir()):
        file.rename(tmp_path / file.name.replace("-idx", ".idx"))
    assert len(load(str(tmp_path), split_seed=0).train_labels) == 60


def test_an_array_of_any_shape_survives_the_format(tmp_path: Path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx.content(array))
    np.testing.assert_array_equal(read_idx(tmp_path / "a", rank=3), array)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "cut off"),
        (lambda data: data[:9], "cut off within its header"),
        (lambda data: b"", "cut off within its header"),
        (lambda data: data + b"\0", "too long"),
        (lambda data: b"\0\0\x0d\x03" + data[4:], "0x00000d03 in place of 0x00000803"),
        (lambda data: b"\0\0\x08\x01" + data[4:], "0x00000801 in place of 0x00000803"),
        (lambda data: data[:4] + b"\xff" * 12 + data[16:], "cut off"),
        (lambda data: data[:4] + b"\0" * 12, "holds nothing"),
        (lambda data: data[:7] + b"\x3b" + data[8:-30], "59 images in .* 60 labels"),
    ],
)
def test_damaged_images_are_one_clear_line(tmp_path: Path, damage, message: str):
    idx.write(tmp_path, compress=False)
    file = tmp_path / TRAIN_IMAGES
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(Failure, match=message) as caught:
        load(str(tmp_path), split_seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-9],
        lambda data: data[:40] + bytes(reversed(data[40:60])) + data[60:],
        lambda data: gzip.decompress(data),
        lambda data: data[:2] + b"\x07" + data[3:],
    ],
    ids=["cut off", "flipped bytes", "not compressed", "unknown method"],
)
def test_damaged_compression_is_one_clear_line(tmp_path: Path, damage):
    idx.write(tmp_path, compress=True)
    file = tmp_path / f"{TRAIN_IMAGES}.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(
        Failure, match=f"{TRAIN_IMAGES}.gz: cannot be read: ."
    ) as caught:
        load(str(tmp_path), split_seed=0)
    assert "\n" not in str(caught.value)


def test_a_label_out_of_range_is_named(tmp_path: Path):
    idx.write(tmp_path, compress=False)
    labels = np.arange(60) % 10
    labels[7] = 10
    (tmp_path / TRAIN_LABELS).write_bytes(idx.content(labels))
    with pytest.raises(Failure, match="label 10 is out of range, labels are 0 to 9"):
        load(str(tmp_path), split_seed=0)


def test_images_of_two_sizes_are_refused(tmp_path: Path):
    idx.write(tmp_path, compress=False)
    other = np.zeros((20, 4, 4))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx.content(other))
    with pytest.raises(Failure, match="has 30 pixels, a test image 16"):
        load(str(tmp_path), split_seed=0)


def test_a_missing_directory_and_a_missing_file_are_named(tmp_path: Path):
    with pytest.raises(Failure, match="nowhere is not a directory"):
        load(str(tmp_path / "nowhere"), split_seed=0)
    with pytest.raises(Failure, match=f"no {TRAIN_IMAGES} here"):
        load(str(tmp_path), split_seed=0)
