"""`examples/wasserstein.py`: its numbers on a problem whose answer is known."""

import functools as ft

import jax.numpy as jnp
import numpy as np
import pytest
import wasserstein
from trainer import (
    assert_left,
    assert_one_line,
    completed,
    numbers,
    rows,
    run_of,
    strict_json,
)


pytestmark = pytest.mark.usefixtures("quick_compilation")


run = ft.partial(run_of, wasserstein.WassersteinFlags, wasserstein.train, "--quick")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("wasserstein")
    return completed(run, out)


def test_a_run_leaves_its_results(finished):
    assert_left(finished)
    assert len(rows(finished)) == 3 * 3 * 2
    assert list(strict_json(finished / "results.json")["methods"]) == [
        "relu",
        "maxmin",
        "fullsort",
    ]


def test_no_network_finds_more_than_there_is(finished):
    for result in strict_json(finished / "results.json")["methods"].values():
        bound = result["lipschitz_bound"]
        assert bound["largest"] <= 1.001
        for estimate, most in zip(
            result["estimate"]["seeds"], bound["seeds"], strict=True
        ):
            assert 0 < estimate <= most


def test_the_best_function_is_the_norm():
    points = wasserstein.on_sphere(wasserstein.jr.key(0), 100, 8)
    norm = lambda x: jnp.sqrt(jnp.sum(x * x))[None]
    assert wasserstein.gap(norm, points) == pytest.approx(1, abs=1e-6)


def test_in_one_dimension_sorting_finds_it_and_relu_does_not(tmp_path):
    flags = ("--dimension", 1, "--epochs", 60, "--depth", 2, "--out", tmp_path)
    assert run(*flags, "--methods", "relu", "maxmin", "--learning-rate", 0.02).code == 0
    found = strict_json(tmp_path / "results.json")["methods"]
    assert found["maxmin"]["estimate"]["mean"] > 0.95
    assert found["relu"]["estimate"]["mean"] < 0.9


def test_a_finished_run_goes_on_to_the_same_numbers(finished, tmp_path):
    # The schedule is of all epochs, so that a run of fewer is another one.
    outcome = run("--out", finished, "--resume")
    assert outcome.code == 0
    assert run("--out", tmp_path).code == 0
    assert numbers(tmp_path) == numbers(finished)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--width", 3), "--width must be even and at least 2, got 3"),
        (("--data", "digits"), "--data must be `sphere`, got digits"),
        (("--batch-size", 1000), "--batch-size must be at most `points`"),
        (("--methods", "relu", "relu"), "--methods must be named once each"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(tmp_path, flags, message):
    assert_one_line(run("--out", tmp_path / "new", *flags), message, code=2)


def test_the_note_says_what_was_found():
    results = {
        name: {"estimate": {"mean": mean}}
        for name, mean in (("relu", 0.5), ("fullsort", 0.9951))
    }
    assert "0.50 of it with ReLU, and 0.9951" in wasserstein.note(results)
    assert wasserstein.note({"relu": results["relu"]}) == ""


def test_points_are_on_the_sphere():
    points = wasserstein.on_sphere(wasserstein.jr.key(1), 50, 16)
    norms = np.linalg.norm(np.asarray(points, np.float64), axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-6)
