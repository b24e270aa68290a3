"""`examples/certified.py`: no attack is below the certificate, and numpy agrees."""

import functools as ft
from pathlib import Path

import certified
import equinox as eqx
import eqxreg
import idx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from common import data
from common.attack import distances, double_precision
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


run = ft.partial(run_of, certified.CertifiedFlags, certified.train, "--quick")
METHODS = ["free", "small", "large"]
RADII = (0.1, 0.5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("certified")
    return completed(run, out)


@pytest.fixture(scope="module")
def models(finished):
    """The trained networks, from the checkpoint, by method."""
    flags = parse(certified.CertifiedFlags, ["--quick"])
    arms = certified.make_arms(flags, data.digits(0))
    return {arm.name: arm.finish(saved_state(arm, finished)) for arm in arms}


def in_numpy(model, images):
    """Logits of the first seed and the product of the largest singular values."""
    x, bound = images.astype(float), 1.0
    for layer in model.layers:
        if isinstance(layer, eqx.nn.Linear):
            assert layer.bias is not None
            weight = np.asarray(layer.weight[0], float)
            bound *= np.linalg.svd(weight, compute_uv=False)[0]
            x = x @ weight.T + np.asarray(layer.bias[0], float)
        elif isinstance(layer, eqxreg.MaxMin):
            x = np.sort(x.reshape(len(x), -1, 2), axis=2).reshape(len(x), -1)
        else:
            x = np.maximum(x, 0)
    return x, bound


def test_a_run_leaves_its_results(finished):
    assert_left(finished)
    assert len(rows(finished)) == 3 * 8 * 2
    methods = strict_json(finished / "results.json")["methods"]
    assert list(methods) == METHODS
    assert all(m["test_accuracy"]["mean"] > 0.75 for m in methods.values())


def test_no_attack_is_below_the_certificate(finished):
    for result in strict_json(finished / "results.json")["methods"].values():
        for radius in RADII:
            certain = result[f"certified_at_{radius}"]["seeds"]
            left = result[f"attacked_at_{radius}"]["seeds"]
            clean = result["test_accuracy"]["seeds"]
            for a, b, c in zip(certain, left, clean, strict=True):
                assert 0 <= a <= b <= c


def test_each_image_is_farther_than_its_radius(models):
    images = data.digits(0)
    for model in models.values():
        radius, _ = certified.certified(model, images)
        found = distances(model, images.test_images, images.test_labels, RADII, 5)
        assert (np.isfinite(found) & (found > 0)).mean() > 0.1
        assert (found[radius > 0] > radius[radius > 0]).all()
        assert (found[radius == 0] == 0).all()


def test_orthogonal_networks_certify_what_free_ones_cannot(finished):
    methods = strict_json(finished / "results.json")["methods"]
    for name in ("small", "large"):
        assert methods[name]["lipschitz_bound"]["largest"] <= 1.0001
        certain = methods[name]["certified_at_0.5"]["mean"]
        assert certain > methods["free"]["certified_at_0.5"]["mean"] + 0.1
    assert methods["free"]["lipschitz_bound"]["mean"] > 2


@pytest.mark.parametrize("name", METHODS)
def test_numpy_finds_the_reported_shares(finished, models, name):
    images = data.digits(0)
    logits, bound = in_numpy(models[name], images.test_images)
    ordered = np.sort(logits, axis=1)
    radius = (ordered[:, -1] - ordered[:, -2]) / np.sqrt(2) / bound
    right = logits.argmax(axis=1) == images.test_labels
    result = strict_json(finished / "results.json")["methods"][name]
    assert result["test_accuracy"]["seeds"][0] == pytest.approx(right.mean())
    reported = result["lipschitz_bound"]["seeds"][0]
    assert bound <= reported <= bound * 1.0001
    for r in RADII:
        # The bound has a margin for rounding, so that an image at the edge may differ.
        share = (right & (radius > r)).mean()
        assert result[f"certified_at_{r}"]["seeds"][0] == pytest.approx(share, abs=3e-3)


def test_certificates_are_of_double_precision(models):
    images = data.digits(0)
    radius, bound = certified.certified(models["large"], images)
    assert radius.dtype == bound.dtype == np.float64
    logits, exact = in_numpy(models["large"], images.test_images)
    ordered = np.sort(logits, axis=1)
    margin = (ordered[:, -1] - ordered[:, -2]) / np.sqrt(2)
    certain = radius[0] > 0
    np.testing.assert_allclose(
        radius[0][certain] * bound[0], margin[certain], rtol=1e-9, atol=1e-12
    )
    assert not jax.config.read("jax_enable_x64")


def test_the_nearest_image_of_a_linear_network_is_found():
    # Its distance is known: the margin over the norm of the difference of two rows.
    linear = eqx.nn.Linear(4, 2, use_bias=False, key=jr.key(0))
    weight = jnp.array([[[1.0, 0, 0, 0], [0, 1.0, 0, 0]]])
    linear = eqx.tree_at(lambda layer: layer.weight, linear, weight)
    images = np.array([[0.7, 0.3, 0.5, 0.5], [0.3, 0.7, 0.5, 0.5]], np.float32)
    labels = np.array([0, 0], np.int32)
    found = distances(linear, images, labels, (0.1, 0.5), 20)
    assert found.shape == (1, 2) and found[0, 1] == 0
    assert found[0, 0] == pytest.approx(0.4 / np.sqrt(2), rel=2e-3)
    assert np.isinf(distances(linear, images, labels, (0.1,), 20)[0, 0])


def test_double_precision_ends_where_it_is_left():
    with pytest.raises(KeyError), double_precision():
        assert jnp.ones(1).dtype == jnp.float64
        raise KeyError
    assert jnp.ones(1).dtype == jnp.float32


def test_a_finished_run_goes_on_to_the_same_numbers(finished, tmp_path):
    assert run("--methods", "small", "--out", tmp_path).code == 0
    before = numbers(tmp_path)
    assert run("--methods", "small", "--out", tmp_path, "--resume").code == 0
    assert numbers(tmp_path) == before
    methods, lines = numbers(finished)
    expected = [line for line in lines if line["method"] == "small"]
    assert before == ({"small": methods["small"]}, expected)


def test_images_from_files_get_what_suits_them(tmp_path):
    idx.write(tmp_path, compress=False)
    flags = parse(certified.CertifiedFlags, ["--data", str(tmp_path)])
    assert (flags.width, flags.large_offset) == (256, 3.5)
    given = ["--data", str(tmp_path), "--width", "32"]
    assert parse(certified.CertifiedFlags, given).width == 32
    assert parse(certified.CertifiedFlags, []).width == 64


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--width", 3), "--width must be even and at least 2, got 3"),
        (("--radii", 0.5, 0.1), "--radii must be positive and ascending"),
        (("--radii", 0.0, 0.1), "--radii must be positive and ascending"),
        (("--large-temperature", 0), "--large-temperature must be positive"),
        (("--batch-size", 5000), "--batch-size must be at most 1347 here"),
        (("--data", "nowhere"), "nowhere is not a directory"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(tmp_path, flags, message):
    code = 1 if "--data" in flags else 2
    assert_one_line(run("--out", tmp_path / "new", *flags), message, code=code)


def test_the_note_says_what_was_found():
    results = {
        name: {
            "certified_at_1.58": {"mean": certain},
            "attacked_at_1.58": {"mean": left},
        }
        for name, certain, left in (("free", 0.0, 0.03), ("large", 0.646, 0.7))
    }
    text = certified.note(results, 1.58)
    assert "Moved by 1.58, 65 % of the images are certain" in text
    assert "Without constraints: 0 %, and an attack leaves 3 %." in text
    assert certified.note({"free": results["free"]}, 1.58) == ""


PAGE = Path(__file__).parents[2] / "docs" / "gallery"


@pytest.fixture(scope="module")
def published():
    """What the page of the gallery shows: MNIST."""
    return strict_json(PAGE / "certified.json")


def test_the_published_networks_certify_what_was_asked_of_them(published):
    assert published["data"]["test_images"] == 10_000
    small, large = (published["methods"][name] for name in ("small", "large"))
    assert large["certified_at_1.58"]["mean"] >= 0.64
    assert large["test_accuracy"]["mean"] >= 0.96
    assert small["certified_at_0.3"]["mean"] >= 0.962
    assert small["test_accuracy"]["mean"] >= 0.986
    for result in (small, large):
        assert 1 <= result["lipschitz_bound"]["largest"] <= 1.0001


def test_the_page_is_right_about_the_network_without_constraints(published):
    free = published["methods"]["free"]
    assert free["certified_at_0.1"]["largest"] == 0
    assert 1000 < free["lipschitz_bound"]["mean"] < 10_000
    assert free["attacked_at_0.1"]["mean"] > 0.9
    assert free["attacked_at_1.58"]["mean"] < 0.15
    accuracy = published["methods"]["small"]["test_accuracy"]["mean"]
    assert free["test_accuracy"]["mean"] == pytest.approx(accuracy, abs=0.005)


def test_no_published_attack_is_below_its_certificate(published):
    for result in published["methods"].values():
        for radius in published["flags"]["radii"]:
            for certain, left in zip(
                result[f"certified_at_{radius:g}"]["seeds"],
                result[f"attacked_at_{radius:g}"]["seeds"],
                strict=True,
            ):
                assert certain <= left
