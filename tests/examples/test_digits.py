"""`examples/digits.py` from end to end: its files, its numbers, `--resume`, errors."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import digits
import idx
import numpy as np
import pytest
from common import data, report
from common.checkpoint import Checkpoint
from common.run import parse
from trainer import (
    assert_left,
    assert_one_line,
    largest_file,
    numbers,
    rows,
    run,
    saved_arrays,
    strict_json,
)


ALL = ("none", "decay", "forward", "project", "penalty")
# A bound that the weights reach within the three epochs of `--quick`.
QUICK = ("--quick", "--max-norm", 0.7, "--save-every", 1)
SHORT = (*QUICK, "--methods", "none", "--epochs", 1)
# For the data sets of `idx`.
SMALL = (*SHORT, "--seeds", 1, "--batch-size", 20)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, compilation_cache: dict[str, str]
) -> Path:
    """The output of an undisturbed quick run of all methods."""
    out = tmp_path_factory.mktemp("finished")
    outcome = run(*QUICK, "--out", out)
    assert outcome.code == 0 and outcome.err == ""
    return out


def test_a_run_leaves_its_results_and_nothing_else(finished: Path):
    assert_left(finished)
    png = (finished / "figure.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(png[16:20]) == 1200 and int.from_bytes(png[20:24]) == 500


def test_metrics_and_results_agree(finished: Path):
    methods = strict_json(finished / "results.json")["methods"]
    assert tuple(methods) == ALL
    lines = rows(finished)
    assert len(lines) == len(ALL) * 3 * 2
    for name, result in methods.items():
        last = [row for row in lines if row["method"] == name and row["epoch"] == "3"]
        for metric in ("train_loss", "test_accuracy", "largest_unit_norm"):
            values = [float(row[metric]) for row in last]
            assert result[metric]["seeds"] == values
            assert result[metric]["mean"] == pytest.approx(np.mean(values))
            # The error of the mean of two is half their difference.
            error = abs(values[0] - values[1]) / 2
            assert result[metric]["standard_error"] == pytest.approx(error)
        assert 0.5 < result["test_accuracy"]["mean"] < 1


def test_constrained_weights_obey_the_bound(finished: Path):
    methods = strict_json(finished / "results.json")["methods"]
    for name in ("forward", "project"):
        assert methods[name]["largest_unit_norm"]["largest"] <= 0.7
        assert methods[name]["distance_to_set"]["largest"] == 0
    assert methods["none"]["largest_unit_norm"]["largest"] > 0.75
    assert (
        methods["penalty"]["distance_to_set"]["mean"]
        < methods["none"]["distance_to_set"]["mean"]
    )
    # The distance, from its definition, of weights taken from the checkpoint.
    weight = saved_arrays(finished)["none.params.hidden[0].weight"].astype(float)
    excess = np.maximum(np.linalg.norm(weight, axis=-1) - 0.7, 0)
    distance = np.sqrt((excess**2).sum(axis=-1))
    reported = methods["none"]["distance_to_set"]["seeds"]
    np.testing.assert_allclose(reported, distance, rtol=1e-4)


def bounded(weight: np.ndarray) -> np.ndarray:
    """Max-norm as its definition has it, in float64."""
    norms = np.linalg.norm(weight, axis=-1, keepdims=True)
    return weight * np.minimum(1, 0.7 / norms)


@pytest.mark.parametrize(
    ("method", "middle", "transform"),
    [
        ("none", "", lambda weight: weight),
        ("decay", "", lambda weight: weight),
        ("forward", ".layer", bounded),
        ("project", "", bounded),
        ("penalty", "", lambda weight: weight),
    ],
)
def test_numpy_finds_the_reported_accuracy_in_the_checkpoint(
    finished: Path, method: str, middle: str, transform: Callable
):
    saved = saved_arrays(finished)
    images = data.digits(split_seed=0)
    hidden, readout = f"{method}.params.hidden[0]{middle}", f"{method}.params.readout"
    weight = transform(saved[f"{hidden}.weight"].astype(float))
    units = images.test_images @ weight.mT + saved[f"{hidden}.bias"][:, None]
    weight = saved[f"{readout}.weight"].astype(float)
    logits = np.maximum(units, 0) @ weight.mT + saved[f"{readout}.bias"][:, None]
    accuracy = (logits.argmax(axis=-1) == images.test_labels).mean(axis=1)
    results = strict_json(finished / "results.json")["methods"][method]
    assert results["test_accuracy"]["seeds"] == pytest.approx(accuracy.tolist())


def test_true_labels_imply_other_defaults_and_what_is_given_wins():
    noisy, clean, quick = (
        parse(digits.DigitsFlags, flags)
        for flags in (
            [],
            ["--label-noise", "0", "--max-norm", "2"],
            ["--label-noise", "0", "--quick"],
        )
    )
    assert (noisy.label_noise, noisy.dropout, noisy.epochs) == (0.4, 0, 60)
    assert (clean.dropout, clean.epochs, clean.max_norm) == (0.5, 24, 2)
    assert (quick.dropout, quick.epochs, quick.max_norm) == (0.5, 3, 1)


def test_a_share_of_the_training_labels_is_drawn_at_random():
    images = data.digits(split_seed=0)
    same, again, noisy, all_of_them = (
        data.with_random_labels(images, share, seed=0) for share in (0, 0.4, 0.4, 1)
    )
    wrong = lambda some: np.mean(some.train_labels != images.train_labels)
    assert wrong(same) == 0
    # One in ten of those that are drawn is right.
    assert wrong(noisy) == pytest.approx(0.36, abs=0.02)
    assert wrong(all_of_them) == pytest.approx(0.9, abs=0.03)
    np.testing.assert_array_equal(noisy.train_labels, again.train_labels)
    for some in (noisy, all_of_them):
        assert some.test_labels is images.test_labels
        assert some.train_images is images.train_images
        assert set(some.train_labels) == set(range(10))


def test_the_note_is_of_the_best_epoch_and_of_the_last_five():
    accuracy = lambda *rows: {"test_accuracy": np.array(rows)[:, None]}
    free = accuracy(0.2, 0.9, 0.5, 0.6, 0.7, 0.6, 0.6)
    histories = {"none": free, "forward": accuracy(*[0.8] * 7)}
    assert digits.note(histories) == (
        "Unconstrained: 90 % at best, 60 % in the end. "
        "With max-norm: 80 % at best, 80 % in the end."
    )
    assert digits.note({"none": free}) == ""


def test_all_methods_begin_with_the_same_weights():
    flags = digits.DigitsFlags(seeds=2, width=8, depth=1)
    images = data.digits(split_seed=0)
    bound = digits.eqxreg.MaxNorm(2.0, axis="unit")
    arms = digits.make_arms(flags, images, digits.all_methods(flags, bound))
    starts = [digits.unit_norms(arm.finish(arm.start)) for arm in arms]
    for start in starts[1:]:
        np.testing.assert_array_equal(start, starts[0])
    assert not np.array_equal(starts[0][0], starts[0][1])  # Two seeds differ.


def test_a_stopped_run_resumes_to_the_same_numbers(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measure_on = digits.measure_on

    def interrupted(*arguments):
        measure, calls = measure_on(*arguments), iter(range(1000))

        def measure_and_interrupt(model):
            if next(calls) == len(ALL) + 1:  # In the middle of the second epoch.
                os.kill(os.getpid(), signal.SIGINT)
            return measure(model)

        return measure_and_interrupt

    with monkeypatch.context() as patch:
        patch.setattr(digits, "measure_on", interrupted)
        stopped = run(*QUICK, "--out", tmp_path, "--save-every", 100)
    assert stopped.code == 130
    assert stopped.err == "stopped: 2 of 3 epochs are done; --resume goes on\n"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.npz"]
    assert run(*QUICK, "--out", tmp_path, "--resume").code == 0
    assert numbers(tmp_path) == numbers(finished)
    ours, theirs = saved_arrays(tmp_path), saved_arrays(finished)
    assert list(ours) == list(theirs)
    for name in ours:
        if not name.endswith("seconds"):
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_killed_script_resumes_to_the_same_numbers(
    finished: Path, tmp_path: Path, child_environment: dict[str, str]
):
    script = [sys.executable, digits.__file__, "--out", tmp_path]
    options = {
        "env": {**child_environment, "PYTHONUNBUFFERED": "1"},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    with subprocess.Popen([*script, *map(str, QUICK)], **options) as child:
        for line in child.stdout:
            if "epoch 2" in line:
                child.kill()
        complaint = child.stderr.read()
    assert child.returncode == -signal.SIGKILL, complaint
    again = subprocess.run([*script, *map(str, QUICK), "--resume"], **options)
    assert again.returncode == 0 and again.stderr == ""
    assert "max-norm, forward pass" in again.stdout
    assert numbers(tmp_path) == numbers(finished)


def test_a_finished_run_goes_on_to_more_epochs(finished: Path, tmp_path: Path):
    assert run(*QUICK, "--out", tmp_path, "--epochs", 1).code == 0
    assert run(*QUICK, "--out", tmp_path, "--resume").code == 0
    assert numbers(tmp_path) == numbers(finished)


def test_resuming_a_run_that_is_done_changes_nothing(finished: Path):
    before = numbers(finished)
    assert run(*QUICK, "--out", finished, "--resume").code == 0
    assert numbers(finished) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dropout", 0.4), "dropout is 0.4 now, but was 0.0"),
        (("--label-noise", 0.1), "label_noise is 0.1 now, but was 0.4"),
        (("--width", 32), "width is 32 now, but was 64"),
        (("--methods", "none"), "methods is ['none'] now"),
        (("--split-seed", 1), "split_seed is 1 now, but was 0"),
        (("--epochs", 2), "--epochs is 2, but 3 are done already"),
    ],
)
def test_resuming_with_other_flags_is_refused(finished: Path, flags, message: str):
    before = numbers(finished)
    outcome = run(*QUICK, "--out", finished, "--resume", *flags)
    assert_one_line(outcome, message)
    assert numbers(finished) == before


def test_resuming_nothing_is_refused(tmp_path: Path):
    out = tmp_path / "new"
    assert_one_line(run(*QUICK, "--out", out, "--resume"), "there is no checkpoint")
    assert not out.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-100],
        lambda content: content[:5000] + b"other" + content[5005:],
        lambda content: b"",
        lambda content: b"not an archive",
    ],
)
def test_a_damaged_checkpoint_is_one_clear_line(
    finished: Path, tmp_path: Path, damage: Callable
):
    content = (finished / "checkpoint.npz").read_bytes()
    (tmp_path / "checkpoint.npz").write_bytes(damage(content))
    outcome = run(*QUICK, "--out", tmp_path, "--resume")
    assert_one_line(outcome, "checkpoint.npz: cannot be read: ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sedes", 3), "Unrecognized options: --sedes"),
        (("--seeds", "many"), "--seeds: invalid literal"),
        (("--seeds", 0), "--seeds must be at least 1, got 0"),
        (("--epochs", -1), "--epochs must be at least 1, got -1"),
        (("--methods", "none", "some"), "invalid choice 'some'"),
        (("--methods", "none", "none"), "--methods must be named once each"),
        (("--dropout", 1.0), "--dropout must be at least 0 and below 1, got 1.0"),
        (("--label-noise", 1.5), "--label-noise must be at least 0 and at most 1"),
        (("--max-norm", "nan"), "--max-norm must be positive and finite, got nan"),
        (("--learning-rate", "inf"), "--learning-rate must be positive and finite"),
        (("--batch-size", 5000), "--batch-size must be at most 1347"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(tmp_path: Path, flags, message: str):
    out = tmp_path / "new"
    assert_one_line(run(*QUICK, "--out", out, *flags), message, code=2)
    assert not out.exists()


def test_the_script_exits_with_the_code(child_environment: dict[str, str]):
    script = [sys.executable, digits.__file__, "--epochs", "0"]
    child = subprocess.run(script, env=child_environment, capture_output=True)
    assert (child.returncode, child.stdout) == (2, b"")
    assert child.stderr == b"error: --epochs must be at least 1, got 0\n"


def test_help_names_every_flag():
    outcome = run("--help")
    assert outcome.code == 0
    for flag in ("out", "data", "seeds", "epochs", "quick", "resume", "methods"):
        assert f"--{flag}" in outcome.out


def test_a_wrong_place_for_the_output_is_one_clear_line(tmp_path: Path):
    (tmp_path / "file").touch()
    outcome = run(*QUICK, "--out", tmp_path / "file")
    assert_one_line(outcome, "file is a file, not a directory")
    outcome = run(*QUICK, "--out", tmp_path / "file" / "below")
    assert_one_line(outcome, "Not a directory")


def test_wrong_data_is_one_clear_line_and_leaves_nothing(tmp_path: Path):
    source, out = tmp_path / "data", tmp_path / "out"
    assert_one_line(run("--data", source, "--out", out), "is not a directory")
    source.mkdir()
    idx.write(source, compress=False)
    images = source / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    assert_one_line(run("--data", source, "--out", out), "cut off")
    assert not out.exists()


def test_plain_and_compressed_idx_files_train_alike(tmp_path: Path):
    found = []
    for compress in (False, True):
        source, out = tmp_path / f"data{compress}", tmp_path / f"out{compress}"
        source.mkdir()
        idx.write(source, compress=compress)
        assert run(*SMALL, "--data", source, "--out", out).code == 0
        found.append(numbers(out))
    assert found[0] == found[1]
    about = strict_json(out / "results.json")["data"]
    assert (about["training_images"], about["test_images"]) == (60, 20)


def results(out: Path) -> list[Path]:
    """All that a run leaves behind but its checkpoint."""
    return [path for path in sorted(out.iterdir()) if path.suffix != ".npz"]


def limit_files(monkeypatch, place, name: str, size: int) -> None:
    """Fills the disk, as it were, while `place.name` runs."""
    original = getattr(place, name)

    def limited(*arguments):
        with largest_file(size):
            return original(*arguments)

    monkeypatch.setattr(place, name, limited)


def test_a_disk_too_full_for_a_checkpoint_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    limit_files(monkeypatch, Checkpoint, "save", 10_000)
    out = tmp_path / "new"
    assert_one_line(
        run(*SHORT, "--out", out), "cannot write checkpoint.npz: File too large"
    )
    assert not out.exists()


def test_a_disk_too_full_for_the_results_keeps_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run(*SHORT, "--out", tmp_path).code == 0
    files = {path: path.read_bytes() for path in results(tmp_path)}
    # Enough for metrics.csv, which is written first, and not for the figure.
    limit_files(monkeypatch, report, "write_files", 20_000)
    outcome = run(*SHORT, "--out", tmp_path, "--epochs", 2)
    assert_one_line(outcome, "results.json and figure.png: File too large")
    assert {path: path.read_bytes() for path in results(tmp_path)} == files


def test_one_seed_has_no_standard_error_and_divergence_is_still_json(tmp_path: Path):
    idx.write(tmp_path, compress=False)
    flags = ("--data", tmp_path, "--out", tmp_path, "--learning-rate", 1e30)
    assert run(*SMALL, *flags).code == 0
    result = strict_json(tmp_path / "results.json")["methods"]["none"]
    assert result["train_loss"]["mean"] is None
    assert result["test_accuracy"]["standard_error"] is None
    assert [row["train_loss"] for row in rows(tmp_path)] == [""]
