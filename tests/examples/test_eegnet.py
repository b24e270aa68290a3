"""`examples/eegnet.py`: its network against a plain one, and its bounds."""

import functools as ft
import json

import eegnet
import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import quick
from common.eegnet import EEGNet, Filters, SpatialFilters, pooled
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


def part(count, rng):
    """Four channels of noise, of which one has a wave: which, is the class."""
    labels = np.arange(count) % 3
    wave = 2 * np.sin(np.arange(64) * np.pi / 6)
    here = labels[:, None, None] == np.arange(4)[:, None]
    return rng.normal(size=(count, 4, 64)) + wave * here, labels


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The trainer, on a small file of our own."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("epochs") / "some.npz"
    (train, labels), (test, test_labels) = part(48, rng), part(24, rng)
    np.savez(
        path,
        train_epochs=train,
        train_labels=labels,
        test_epochs=test,
        test_labels=test_labels,
    )
    flags = ("--quick", "--data", path, "--average", 2, "--filter-length", 6)
    flags += ("--relative-bound", 0.5)
    return ft.partial(run_of, eegnet.EEGNetFlags, eegnet.train, *flags)


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory, quick_compilation):
    out = tmp_path_factory.mktemp("eegnet")
    return completed(run, out)


def test_a_run_leaves_its_results(finished):
    assert_left(finished)
    assert len(rows(finished)) == 4 * 3 * 2
    results = strict_json(finished / "results.json")
    assert list(results["methods"]) == ["none", "paper", "relative", "decay"]
    assert results["data"]["channels"] == 4 and results["data"]["samples"] == 32


def test_bounds_hold_and_the_ways_without_any_pass_them(finished):
    found = strict_json(finished / "results.json")["methods"]
    assert found["paper"]["spatial_norm"]["largest"] <= 1
    assert found["paper"]["classifier_norm"]["largest"] <= 0.25
    assert min(found["none"]["classifier_norm"]["seeds"]) > 0.25
    # Half of what they were at first, which is what the others still have about.
    for norm in ("spatial_norm", "classifier_norm"):
        pairs = zip(
            found["relative"][norm]["seeds"], found["none"][norm]["seeds"], strict=True
        )
        for relative, free in pairs:
            assert relative == pytest.approx(free / 2, rel=0.1)


def test_a_relative_bound_is_of_the_norms_that_the_filters_had(finished):
    first, _ = eegnet.seed_keys(2)
    start = eqx.filter_vmap(lambda key: new_network(key, 4, 32).spatial.weight)(first)
    raw = saved_arrays(finished)
    (name,) = (n for n in raw if n.startswith("relative.params.spatial"))
    half = np.linalg.norm(np.asarray(start, np.float64), axis=-1) / 2
    norms = np.linalg.norm(raw[name].astype(np.float64), axis=-1)
    largest = np.minimum(norms, half).max(axis=1)
    found = strict_json(finished / "results.json")["methods"]["relative"]
    np.testing.assert_allclose(found["spatial_norm"]["seeds"], largest, rtol=1e-5)


def test_a_finished_run_goes_on_to_the_same_numbers(run, finished, tmp_path):
    assert run("--out", finished, "--resume").code == 0
    assert run("--out", tmp_path, "--epochs", 2).code == 0
    assert run("--out", tmp_path, "--resume").code == 0
    assert numbers(tmp_path) == numbers(finished)


def test_what_is_held_out_is_another_run(run, finished):
    outcome = run("--out", finished, "--resume", "--held-out", 0.25)
    assert_one_line(outcome, "--resume: held_out is 0.25 now, but was 0.0 in")


def new_network(key, channels=3, samples=40):
    return EEGNet(channels, samples, 3, filter_length=6, dropout=0.5, key=key)


def test_filters_are_correlations(key):
    x = np.asarray(jr.normal(key, (3, 20)), np.float64)
    over_all = Filters(2, 5, False, key)
    for f, c in np.ndindex(2, 3):
        weight = np.asarray(over_all.weight, np.float64)[f]
        expected = np.correlate(np.pad(x[c], (2, 2)), weight, "valid")
        np.testing.assert_allclose(over_all(jnp.float32(x))[f, c], expected, atol=1e-5)
    own = Filters(3, 4, True, key)
    for c in range(3):
        weight = np.asarray(own.weight, np.float64)[c]
        expected = np.correlate(np.pad(x[c], (1, 2)), weight, "valid")
        np.testing.assert_allclose(own(jnp.float32(x))[c], expected, atol=1e-5)


def test_spatial_filters_are_a_convolution_with_groups(key):
    x = jr.normal(key, (8, 3, 20))
    layer = SpatialFilters(3, key)
    conv = eqx.nn.Conv2d(8, 16, (3, 1), groups=8, use_bias=False, key=key)
    weight = layer.weight.reshape(16, 1, 3, 1)
    conv = eqx.tree_at(lambda conv: conv.weight, conv, weight)
    np.testing.assert_allclose(layer(x), conv(x)[:, 0], atol=1e-5)


def test_means_of_neighbours_leave_out_a_rest():
    x = jnp.arange(14.0).reshape(2, 7)
    np.testing.assert_array_equal(pooled(x, 3), [[1, 4], [8, 11]])


def test_statistics_are_of_the_batch_in_training_and_kept_for_inference(key):
    model, state = eqx.nn.make_with_state(new_network)(key)
    x = 5 + jr.normal(key, (6, 3, 40))
    over = {"in_axes": (0, None, 0), "out_axes": (0, None), "axis_name": "batch"}
    trained = quick.filter_jit(lambda *given: jax.vmap(model, **over)(*given))
    logits, after = trained(x, state, jr.split(key, 6))
    assert logits.shape == (6, 3)
    tested = quick.filter_jit(lambda x, state: eqx.nn.inference_mode(model)(x, state))
    before, _ = tested(x[0], state)
    later, unchanged = tested(x[0], after)
    assert not np.allclose(before, later)
    jax.tree.map(np.testing.assert_array_equal, unchanged, after)


def test_the_paper_bounds_filters_and_classes(key):
    model, _ = eqx.nn.make_with_state(new_network)(key)
    large = jax.tree.map(lambda x: 10 * x if eqx.is_inexact_array(x) else x, model)
    bounded = eqxreg.bake(eegnet.paper_bounds(large))
    for layer, bound in ((bounded.spatial, 1), (bounded.classifier, 0.25)):
        norms = np.linalg.norm(np.asarray(layer.weight, np.float64), axis=1)
        assert np.all(norms <= bound) and np.all(norms > 0.999 * bound)
    np.testing.assert_array_equal(bounded.classifier.bias, large.classifier.bias)
    np.testing.assert_array_equal(bounded.temporal.weight, large.temporal.weight)


def test_decay_is_of_the_weights_that_are_bounded(key):
    model, _ = eqx.nn.make_with_state(new_network)(key)
    chosen = eegnet.spatial | eegnet.classifier
    found = [w.shape for w in eqxreg.trainables(model, chosen)]
    assert found == [(16, 3), (3, 16)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--average", 0), "--average must be at least 1, got 0"),
        (("--dropout", 1), "--dropout must be at least 0 and below 1, got 1"),
        (("--relative-bound", 0), "--relative-bound must be positive and finite"),
        (("--decay-rate", -1), "--decay-rate must be at least 0 and finite"),
        (("--batch-size", 49), "--batch-size must be at most 48 here, got 49"),
        (("--average", 3), "--average must be at most 2 here, got 3"),
        (("--methods", "none", "none"), "--methods must be named once each"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(run, tmp_path, flags, message):
    assert_one_line(run("--out", tmp_path / "new", *flags), message, code=2)


def test_data_that_are_not_there_are_one_clear_line(run, tmp_path):
    outcome = run("--data", tmp_path / "none.npz", "--out", tmp_path / "new")
    assert_one_line(outcome, "none.npz is not a file")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("norm", "says"),
    [(0.8, "No spatial filter reaches the bound of 1"), (1, "Spatial filters reach")],
)
def test_the_note_says_what_was_found(norm, says):
    def history(accuracy, norm):
        return {
            "test_accuracy": np.array([[0.1], [accuracy]]),
            "spatial_norm": np.array([[norm], [norm / 2]]),
        }

    histories = {"none": history(0.5, 2), "paper": history(0.45, norm)}
    assert eegnet.note(histories).startswith(says)
    assert eegnet.note(histories).endswith(
        f"norm is {norm:.2f}. Accuracy: 50.0 % without bounds, 45.0 % with them."
    )
    assert eegnet.note({"none": histories["none"]}) == ""


def on_page(name):
    text = (ROOT / "docs" / "gallery" / f"{name}.json").read_text(encoding="utf-8")
    return json.loads(text)["methods"]


@pytest.mark.parametrize("name", ["eegnet", "eegnet-scp1"])
def test_the_pages_are_right_about_what_binds(name):
    found = on_page(name)
    assert found["paper"]["spatial_norm"]["largest"] < 0.9
    assert found["none"]["spatial_norm"]["largest"] < 1
    assert min(found["paper"]["classifier_norm"]["seeds"]) > 0.2499
    first = found["relative"]["classifier_norm"]["largest"]
    assert first < 0.8 * min(found["none"]["classifier_norm"]["seeds"])


def differences(name):
    """Of the accuracies from those without bounds, seed by seed, in standard errors."""
    accuracy = {
        way: np.array(result["test_accuracy"]["seeds"])
        for way, result in on_page(name).items()
    }
    gains = {way: seeds - accuracy["none"] for way, seeds in accuracy.items()}
    return {
        way: gain.mean() / (gain.std(ddof=1) / len(gain) ** 0.5)
        for way, gain in gains.items()
        if way != "none"
    }


def test_the_page_is_right_that_nothing_helps():
    found = differences("eegnet")
    assert abs(found["relative"]) < 1 and abs(found["decay"]) < 1
    assert -1.6 < found["paper"] < -1.4


def test_the_page_is_right_that_all_ways_are_equal_on_one_electrode():
    found = on_page("eegnet-scp1")
    means = [result["test_accuracy"]["mean"] for result in found.values()]
    assert all(0.885 <= mean < 0.895 for mean in means)
    assert max(map(abs, differences("eegnet-scp1").values())) < 1
