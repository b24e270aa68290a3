"""`examples/gan.py`: norms of the critics, checked in float64, and its measures."""

import functools as ft
from pathlib import Path

import gan
import idx
import jax
import numpy as np
import pytest
from common import data
from common.run import parse
from trainer import (
    assert_left,
    assert_one_line,
    completed,
    numbers,
    rows,
    run_of,
    saved_state,
    strict_json,
)


pytestmark = pytest.mark.usefixtures("quick_compilation")


run = ft.partial(run_of, gan.GanFlags, gan.train, "--quick")
METHODS = ["none", "clip", "spectral"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("gan")
    return completed(run, out)


@pytest.fixture(scope="module")
def arms():
    flags = parse(gan.GanFlags, ["--quick"])
    return {arm.name: arm for arm in gan.make_arms(flags, data.digits(0))}


@pytest.fixture(scope="module")
def models(arms, finished):
    """Generator and baked critic of each method, from the checkpoint."""
    return {name: arm.finish(saved_state(arm, finished)) for name, arm in arms.items()}


def singular_values(critic):
    """Those of each layer and seed that are largest, in float64."""
    weights = [layer.weight for layer in critic.layers if hasattr(layer, "weight")]
    return np.array(
        [
            [np.linalg.svd(np.asarray(w, float), compute_uv=False)[0] for w in seeds]
            for seeds in weights
        ]
    )


def test_a_run_leaves_its_results(finished):
    assert_left(finished)
    assert len(rows(finished)) == 3 * 3 * 2
    assert list(strict_json(finished / "results.json")["methods"]) == METHODS


def test_norms_of_a_wrapped_critic_are_one(models):
    norms = singular_values(models["spectral"][1])
    assert norms.shape == (2, 2)
    # What `bake` promises with a state.
    np.testing.assert_allclose(norms, 1, rtol=1e-3)


def test_a_critic_without_a_bound_is_above_it(models):
    assert singular_values(models["none"][1]).max() > 1.2


def test_clipped_weights_are_in_the_range(models):
    flags = parse(gan.GanFlags, ["--quick"])
    for layer in models["clip"][1].layers:
        if hasattr(layer, "weight"):
            weight = np.asarray(layer.weight, float)
            assert np.abs(weight).max() <= np.float32(flags.clip)
    assert np.abs(models["none"][1].layers[0].weight).max() > flags.clip


def test_norms_are_reported_as_they_are(finished, models):
    results = strict_json(finished / "results.json")["methods"]
    for name, (_, critic) in models.items():
        for i, norms in enumerate(singular_values(critic), 1):
            found = results[name][f"norm_{i}"]["seeds"]
            np.testing.assert_allclose(found, norms, rtol=1e-6)


def test_all_begin_with_the_same_generators(arms):
    first = [jax.tree.leaves(arm.start.generator) for arm in arms.values()]
    for leaves in first[1:]:
        for a, b in zip(first[0], leaves, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("part", ["generator", "critic", "memory"])
def test_each_part_of_the_state_is_trained(arms, finished, part):
    arm = arms["spectral"]
    before, after = (
        jax.tree.leaves(getattr(state, part))
        for state in (arm.start, saved_state(arm, finished))
    )
    assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_samples_are_images(models):
    noise = jax.random.normal(jax.random.key(0), (5, 16))
    for generator, _ in models.values():
        made = np.asarray(gan.samples(generator, noise))
        assert made.shape == (2, 5, 64)
        assert made.min() >= 0 and made.max() <= 1 and made.std() > 0


def test_the_energy_distance_is_as_it_is_defined():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(6, 3)), rng.normal(1, 1, size=(5, 3))

    def mean(x, y, same):
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y))]
        pairs = [(i, j) for i, j in pairs if not (same and i == j)]
        return np.mean([np.linalg.norm(x[i] - y[j]) for i, j in pairs])

    expected = 2 * mean(a, b, False) - mean(a, a, True) - mean(b, b, True)
    assert gan.energy_distance(a, b) == pytest.approx(expected)


def test_the_energy_distance_of_one_distribution_is_near_zero():
    images = data.digits(0)
    real, test = images.train_images[:450], images.test_images
    assert abs(gan.energy_distance(real, test)) < 0.02
    noise = np.random.default_rng(0).uniform(size=(450, 64))
    assert gan.energy_distance(noise, test) > 1


def test_classes_are_counted_by_their_shares():
    assert gan.classes_made(np.arange(100) % 10) == pytest.approx(10)
    assert gan.classes_made(np.arange(100) % 2) == pytest.approx(2)
    assert gan.classes_made(np.zeros(100, int)) == pytest.approx(1)


def test_a_resumed_run_gives_the_same_numbers(finished, tmp_path):
    flags = ("--methods", "spectral", "--out", tmp_path)
    assert run(*flags, "--epochs", 2).code == 0
    assert run(*flags, "--resume").code == 0
    methods, lines = numbers(finished)
    expected = [line for line in lines if line["method"] == "spectral"]
    assert numbers(tmp_path) == ({"spectral": methods["spectral"]}, expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--width", 0), "--width must be at least 1, got 0"),
        (("--clip", -1), "--clip must be positive and finite, got -1"),
        (("--none-rates", 0, 1e-3), "--none-rates must be positive and finite"),
        (("--batch-size", 5000), "--batch-size must be at most 1347 here"),
        (("--methods", "none", "none"), "--methods must be named once each"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(tmp_path, flags, message):
    assert_one_line(run("--out", tmp_path / "new", *flags), message, code=2)


def test_images_that_are_not_square_are_refused(tmp_path):
    idx.write(tmp_path, compress=False)
    flags = ("--data", tmp_path, "--batch-size", 20)
    outcome = run("--out", tmp_path / "new", *flags)
    assert_one_line(outcome, "--data must be of square images", code=2)


def test_the_note_says_what_was_found():
    results = {
        name: {
            "energy_distance": {"mean": far},
            "norm_1": {"mean": norm},
            "norm_2": {"mean": 1.0},
        }
        for name, far, norm in (("none", 0.4, 22.6), ("spectral", 0.02, 1.0))
    }
    text = gan.note(results)
    assert "norms of 23, and samples are 0.400 from real images" in text
    assert "with norms of 1, 0.020." in text
    assert gan.note({"none": results["none"]}) == ""


def test_the_page_is_right_about_what_was_found():
    page = Path(__file__).parents[2] / "docs" / "gallery" / "gan.json"
    published = strict_json(page)
    assert published["data"]["name"] == "digits" and published["flags"]["seeds"] == 5
    methods = published["methods"]
    far = {name: result["energy_distance"] for name, result in methods.items()}
    assert far["none"]["mean"] > 2 * far["spectral"]["mean"]
    assert far["spectral"]["mean"] < far["clip"]["mean"] < far["none"]["mean"]
    assert max(far["spectral"]["seeds"]) < min(far["none"]["seeds"])
    assert all(9 < result["classes"]["mean"] < 9.8 for result in methods.values())
    assert methods["none"]["norm_1"]["mean"] > 10
    assert methods["clip"]["norm_2"]["mean"] > 3
    for layer in (1, 2, 3):
        norms = methods["spectral"][f"norm_{layer}"]["seeds"]
        np.testing.assert_allclose(norms, 1, rtol=1e-3)
