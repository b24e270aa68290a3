"""`examples/finetune.py`: what is held stays near its start, measured by hand."""

import functools as ft

import equinox as eqx
import eqxreg
import finetune
import idx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from common import transfer
from scripts import ROOT
from trainer import (
    assert_left,
    assert_one_line,
    completed,
    numbers,
    rows,
    run_of,
    saved_arrays,
    strict_json,
)


pytestmark = pytest.mark.usefixtures("quick_compilation")


run = ft.partial(run_of, finetune.FinetuneFlags, finetune.train, "--quick")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finetune")
    # A radius that makes a difference within the few steps of a quick run.
    return completed(run, out, "--strength", 0.1)


def weights(finished, name, part):
    """The arrays of a way, the seeds first: of `several` the shots come second."""
    start = f"{name}.{part}"
    found = {}
    for key, array in saved_arrays(finished).items():
        if key.startswith(start):
            path = key.removeprefix(start).removeprefix(".params").replace(".layer", "")
            if not path.startswith((".opt_state", ".constants")):
                found[path] = np.asarray(array, np.float64)
    return found


def test_a_run_leaves_its_results(finished):
    assert_left(finished)
    assert len(rows(finished)) == 6 * 3 * 2
    methods = strict_json(finished / "results.json")["methods"]
    assert list(methods) == [*finetune.WAYS, "start"]


def test_each_array_stays_in_its_ball(finished):
    def farthest(name):
        now, start = (weights(finished, name, part) for part in ("several", "start"))
        ways = [now[path] - start[path][:, None] for path in start]
        return max(np.linalg.norm(way.reshape(2, 5, -1), axis=-1).max() for way in ways)

    assert farthest("ball") == pytest.approx(0.1, rel=1e-3)
    assert farthest("plain") > 0.2


def test_what_is_frozen_stays_and_the_last_layer_moves(finished):
    now, start = (weights(finished, "freeze", part) for part in ("several", "start"))
    assert sorted(now) == [".readout.bias", ".readout.weight"]
    assert np.abs(now[".readout.weight"] - start[".readout.weight"][:, None]).max() > 0
    methods = strict_json(finished / "results.json")["methods"]
    assert methods["freeze"]["distance_2_shots"]["largest"] == 0
    assert methods["start"]["distance_2_shots"]["largest"] == 0


def test_all_but_scratch_start_from_the_same_weights(finished):
    plain = weights(finished, "plain", "start")
    for name in ("decay", "towards", "ball"):
        for path, start in weights(finished, name, "start").items():
            np.testing.assert_array_equal(start, plain[path])
    fresh = weights(finished, "scratch", "start")
    assert np.abs(fresh[".readout.weight"] - plain[".readout.weight"]).min() > 0


def test_the_distance_is_that_by_hand(finished):
    methods = strict_json(finished / "results.json")["methods"]
    now, start = (weights(finished, "towards", part) for part in ("several", "start"))
    squares = np.zeros((2, 5))
    for path, array in now.items():
        if path.startswith(".hidden"):
            ways = (array - start[path][:, None]).reshape(2, 5, -1)
            squares += (ways**2).sum(axis=2)
    for column, case in enumerate(("2_shots", "5_shots", "at_0.001", "at_0.003")):
        found = methods["towards"][f"distance_{case}"]["seeds"]
        np.testing.assert_allclose(found, np.sqrt(squares[:, column]), rtol=1e-5)


def test_the_accuracy_is_that_by_hand(finished):
    data = transfer.dirty_digits()
    w = weights(finished, "plain", "several")
    x, y = data.test
    for column, case in enumerate(("2_shots", "5_shots")):
        h = x
        for layer in (".hidden[0]", ".hidden[1]"):
            weight, bias = (
                w[f"{layer}.{kind}"][0, column] for kind in ("weight", "bias")
            )
            h = np.maximum(h @ weight.T + bias, 0)
        logits = h @ w[".readout.weight"][0, column].T + w[".readout.bias"][0, column]
        found = strict_json(finished / "results.json")["methods"]["plain"]
        share = np.mean(logits.argmax(axis=1) == y)
        assert found[f"accuracy_{case}"]["seeds"][0] == pytest.approx(share, abs=0.003)


def test_the_pretrained_network_is_better_than_chance_and_than_a_new_one(finished):
    methods = strict_json(finished / "results.json")["methods"]
    start, scratch = (
        methods[name]["accuracy_2_shots"] for name in ("start", "scratch")
    )
    assert start["mean"] > 0.2
    assert methods["plain"]["accuracy_2_shots"]["mean"] > scratch["mean"]


def test_decay_goes_back_to_the_start_and_not_to_zero():
    new = finetune.DropoutMLP(2, 2, 2, 1, input_dropout=0, dropout=0, key=jr.key(0))
    start = eqx.filter(new, eqx.is_inexact_array)
    moved = jax.tree.map(lambda w: w + 1, start)
    still = jax.tree.map(jnp.zeros_like, start)
    for name, wanted in (("towards", 1.0), ("decay", moved.hidden[0].weight)):
        optimiser = finetune.make_optimiser(name, 0.1, 0.5, start, finetune.base)
        update, _ = optimiser.update(still, optimiser.init(start), moved)
        back = -0.1 * 0.5 * wanted
        np.testing.assert_allclose(
            update.hidden[0].weight, back + np.zeros((2, 2)), 1e-5
        )
        readout = np.abs(update.readout.weight).max()
        assert (readout == 0) == (name == "towards")


def test_a_projection_around_the_start_is_one_of_the_difference():
    start = {"weight": jnp.array([[3.0, 4.0], [0.0, 0.0]])}
    ball = eqxreg.project(eqxreg.MaxNorm(1.0, axis="unit"), mask={"weight": True})
    optimiser = finetune.around_start(ball)
    step = {"weight": jnp.array([[0.0, 5.0], [0.3, 0.4]])}
    update, _ = optimiser.update(step, optimiser.init(start), start)
    moved = optax.apply_updates(start, update)["weight"]
    np.testing.assert_allclose(moved, [[3, 5], [0.3, 0.4]], rtol=1e-6)


def test_labelled_images_are_of_all_classes_and_only_of_the_few():
    data = transfer.dirty_digits()
    chosen = transfer.few_rows(data.few_labels, range(3), 5)
    for order in chosen:
        assert len(set(order)) == 50
        for count in (2, 5):
            labels = data.few_labels[order[: 10 * count]]
            assert np.bincount(labels).tolist() == [count] * 10
    keys = jr.split(jr.key(0), 3)
    plan = transfer.FewPlanner(keys, jnp.asarray(chosen), (2, 5), (7, 4))(1)
    assert plan.rows.shape == (3, 7, 2, 4)
    for seed in range(3):
        assert set(plan.rows[seed, :, 0].ravel().tolist()) <= set(chosen[seed, :20])
        assert set(plan.rows[seed, :, 1].ravel().tolist()) <= set(chosen[seed])


def test_no_image_is_in_two_parts_and_all_have_the_background():
    data = transfer.dirty_digits()
    parts = [data.few_images, data.validation[0], data.test[0]]
    assert len(data.source_images) + sum(map(len, parts)) == 1797
    dirty = np.concatenate(parts)
    background = dirty.min(axis=0)
    assert background.mean() > 0.3 and data.source_images.min(axis=0).max() < 0.3


def test_a_finished_run_goes_on_to_the_same_numbers(finished, tmp_path):
    few = ("--methods", "towards", "freeze", "--strength", 0.1, "--out", tmp_path)
    assert run(*few, "--epochs", 1).code == 0
    assert run(*few, "--resume").code == 0
    methods, lines = numbers(tmp_path)
    wanted, all_lines = numbers(finished)
    assert methods == {name: wanted[name] for name in ("towards", "freeze", "start")}
    assert lines == [x for x in all_lines if x["method"] in ("towards", "freeze")]


def test_from_one_directory_of_images_to_another(tmp_path):
    folders = [tmp_path / name for name in ("before", "after")]
    for folder in folders:
        folder.mkdir()
        idx.write(folder, compress=False, train=120)
    data = transfer.idx_transfer(*folders)
    assert (len(data.few_labels), len(data.validation[1]), len(data.test[1])) == (
        100,
        20,
        20,
    )
    flags = ("--data", folders[0], "--target", folders[1], "--methods", "plain", "ball")
    outcome = run("--out", tmp_path / "out", *flags, "--epochs", 1)
    assert outcome.code == 0 and outcome.err == ""
    described = strict_json(tmp_path / "out" / "results.json")["data"]
    assert described["name"] == "before, then after"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--shots", 5, 2), "--shots must be two or more rising numbers from 1"),
        (("--shots", 0, 2), "--shots must be two or more rising numbers from 1"),
        (("--shots", 2, 200), "--shots must be at most 2"),
        (("--learning-rates", 0.1), "--learning-rates must be two or more, between"),
        (("--label-noise", 1.5), "--label-noise must be from 0 to 1, got 1.5"),
        (("--strength", "nan"), "--strength must be finite"),
        (("--target", "somewhere"), "--target must be given with a directory"),
        (("--data", "somewhere"), "--target must be given with a directory"),
        (("--width", 0), "--width must be at least 1, got 0"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(tmp_path, flags, message):
    assert_one_line(run("--out", tmp_path / "new", *flags), message, code=2)


@pytest.fixture(scope="module")
def published():
    path = ROOT / "docs" / "gallery" / "finetune.json"
    methods = strict_json(path)["methods"]
    return lambda name, metric: 100 * methods[name][f"accuracy_{metric}"]["mean"]


HELD = ("towards", "ball", "freeze")
RATES = ("at_0.0001", "at_0.0003", "at_0.001", "at_0.003")


def test_the_page_has_what_it_says_of_the_usual_learning_rate(published):
    for shots in ("2_shots", "5_shots", "10_shots", "20_shots"):
        plain = published("plain", shots)
        assert abs(published("decay", shots) - plain) < 2
        assert all(published(name, shots) > plain + 3 for name in HELD)
        assert published("scratch", shots) < plain - 10


def test_the_page_has_what_it_says_of_small_learning_rates(published):
    plain = [published("plain", rate) for rate in RATES]
    assert plain == sorted(plain, reverse=True) and plain[0] > plain[-1] + 10
    best = max(published(name, rate) for name in HELD for rate in RATES)
    assert best - 4 < plain[0] < best
    for name in ("towards", "ball"):
        found = [published(name, rate) for rate in RATES]
        assert max(found) - min(found) < 4


def test_the_note_says_what_was_found():
    flags = finetune.FinetuneFlags(shots=(2, 9), learning_rates=(0.1, 0.2, 0.3))
    results = {
        name: {"accuracy_at_0.1": {"mean": small}, "accuracy_at_0.2": {"mean": usual}}
        for name, small, usual in (
            ("plain", 0.8, 0.5),
            ("towards", 0.81, 0.7),
            ("freeze", 0.82, 0.6),
        )
    }
    assert finetune.note(results, flags) == (
        "9 labels a class: plain 50 %, held near the start 70, frozen 60. At the "
        "smallest rate 80, 81, 82."
    )
    assert finetune.note({"plain": results["plain"]}, flags) == ""
