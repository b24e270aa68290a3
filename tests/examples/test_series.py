"""`examples/common/series.py`: its `.ts` files, and what it makes of series."""

import numpy as np
import pytest
import wheel
from common.run import Failure
from common.series import Part, Series, read_ts, split


VALUES = np.random.default_rng(0).normal(size=(4, 2, 3)).round(3)
LABELS = ["left", "right", "left", "left"]
CONTENT = wheel.series(VALUES, LABELS, ["left", "right"])


def test_a_file_is_read_as_it_was_written():
    classes, part = read_ts(CONTENT, "some.ts")
    assert classes == ("left", "right")
    assert part.values.dtype == np.float32 and part.labels.dtype == np.int32
    np.testing.assert_array_equal(part.values, VALUES.astype(np.float32))
    assert part.labels.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT[:90], "some.ts: cut off within its header: there is no @data"),
        (
            CONTENT[:-2],
            "some.ts, line 12: cut off, or not of a class: it ends in 'lef'",
        ),
        (CONTENT[:-9], "some.ts, line 12: cut off, or not of a class"),
        (CONTENT.split(b"@data")[0] + b"@data\n", "some.ts: holds no series"),
        (CONTENT + b"1,2,3:left\n", "line 13: its shape is (1, 3), and (2, 3) before"),
        (
            CONTENT + b"1,2:1,2:left\n",
            "line 13: its shape is (2, 2), and (2, 3) before",
        ),
        (CONTENT + b"1,2,3:1,2:left\n", "line 13: not a rectangle of numbers"),
        (CONTENT + b"1,2,3:1,2,x:left\n", "line 13: not a rectangle of numbers"),
        (CONTENT + b"1,2,3:1,2,?:left\n", "line 13: not a rectangle of numbers"),
        (CONTENT + b"1,2,3:1,2,nan:left\n", "line 13: holds what is not finite"),
        (CONTENT + b"1,2,3:1,2,3:up\n", "line 13: cut off, or not of a class"),
        (
            CONTENT.replace(b"seriesLength 3", b"seriesLength 5"),
            "some.ts: its header promises 5, but 3 follow",
        ),
        (
            CONTENT.replace(b"dimensions 2", b"dimensions 3"),
            "some.ts: its header promises 3, but 2 follow",
        ),
        (
            CONTENT.replace(b"equalLength true", b"equalLength false"),
            "some.ts: its series are of different lengths",
        ),
        (
            CONTENT.replace(b"classLabel true", b"classLabel false"),
            "some.ts: its header names no classes",
        ),
        (b"", "some.ts: cut off within its header"),
        (b"@\n@data\n", "some.ts: its header names no classes"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(content, message):
    with pytest.raises(Failure) as caught:
        read_ts(content, "some.ts")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def data():
    rng = np.random.default_rng(1)
    values = rng.normal(3, 5, size=(40, 2, 7)).astype(np.float32)
    labels = (np.arange(40) % 4 == 0).astype(np.int32)
    test = Part(values[:10] + 1, labels[:10])
    return Series("some", ("no", "yes"), Part(values, labels), test)


def test_channels_are_standardised_by_the_training_examples(data):
    done = data.standardised()
    np.testing.assert_allclose(done.train.values.mean(axis=(0, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(done.train.values.std(axis=(0, 2)), 1, rtol=1e-6)
    deviation = data.train.values.std(axis=(0, 2))[:, None]
    moved = done.test.values - done.train.values[:10]
    np.testing.assert_allclose(
        moved, np.broadcast_to(1 / deviation, (10, 2, 7)), rtol=1e-4
    )


def test_a_channel_that_never_changes_stays_finite(data):
    data.train.values[:, 1] = 2
    assert np.all(data.standardised().train.values[:, 1] == 0)


def test_averages_are_of_neighbours(data):
    shorter = data.averaged(3).train.values
    assert shorter.shape == (40, 2, 2) and shorter.dtype == np.float32
    expected = data.train.values[:, :, 3:6].mean(axis=2)
    np.testing.assert_allclose(shorter[:, :, 1], expected, rtol=1e-5)


def test_what_is_held_out_is_of_the_training_examples_and_of_all_classes(data):
    tuning = data.held_out(0.25, 0)
    assert len(tuning.train.labels) == 30 and len(tuning.test.labels) == 10
    both = np.concatenate([tuning.train.values, tuning.test.values])
    np.testing.assert_array_equal(
        np.sort(both.ravel()), np.sort(data.train.values.ravel())
    )
    assert abs(tuning.test.labels.mean() - 0.25) <= 0.05
    assert data.held_out(0.25, 0).describe() == tuning.describe()
    assert data.held_out(0.25, 1).describe() != tuning.describe()


def test_what_cannot_be_split_is_one_line(data):
    part = Part(data.train.values[:2], data.train.labels[:2])
    with pytest.raises(Failure, match="some: cannot be split in two"):
        split(part, 0.5, 0, "some")


def test_parts_of_different_shapes_are_refused(data):
    other = Part(data.test.values[:, :1], data.test.labels)
    with pytest.raises(Failure, match="a training example has 2 channels of 7 samples"):
        Series("some", data.classes, data.train, other)


def test_a_description_differs_if_a_number_does(data):
    before = data.describe()
    assert before["training_examples"] == 40 and before["test_examples"] == 10
    data.test.values[3, 1, 2] += 1
    assert data.describe()["checksum"] != before["checksum"]
