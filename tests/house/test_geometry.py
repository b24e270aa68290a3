"""What the pictures of sets draw is what NumPy says of these sets."""

import numpy as np
import pytest
from scripts import loaded


@pytest.fixture(scope="module")
def geometry():
    return loaded("docs/_geometry.py")


# Whether points are in the set, but for rounding.
NORM = lambda points: np.linalg.norm(points, axis=1)
MEMBERS = {
    "ball": lambda points: NORM(points) <= 1 + 1e-6,
    "ring": lambda points: (NORM(points) >= 0.6 - 1e-6) & (NORM(points) <= 1 + 1e-6),
    "sphere": lambda points: abs(NORM(points) - 1) <= 2e-6,
    "box": lambda points: np.all(abs(points) <= 0.7 + 1e-6, axis=1),
    "orthant": lambda points: np.all(points >= 0, axis=1),
    "simplex": lambda points: (
        np.all(points >= 0, axis=1) & (abs(points.sum(axis=1) - 1) <= 1e-6)
    ),
}


def members(name):
    """Many points of the set, found without the library."""
    angle = np.linspace(0, 2 * np.pi, 20_001)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    share = np.linspace(0, 1, 20_001)
    curves = {"sphere": circle, "simplex": np.stack([share, 1 - share], axis=1)}
    line = np.linspace(-2, 2, 801)
    plane = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    return curves.get(name, plane[MEMBERS[name](plane)])


@pytest.mark.parametrize("name", MEMBERS)
def test_arrows_lead_to_the_nearest_point_of_the_set(geometry, name):
    title = next(title for title in geometry.SETS if title.startswith(name))
    starts = geometry.starts()
    ends = geometry.images(geometry.SETS[title], starts)
    assert MEMBERS[name](ends).all()
    length = np.linalg.norm(ends - starts, axis=1)
    others = np.linalg.norm(members(name) - starts[:, None], axis=2).min(axis=1)
    # The grid has a point at 0.0025 along each axis.
    assert np.all(length <= others + 1e-5) and np.all(length >= others - 4e-3)


def test_singular_values_are_capped_scaled_or_all_one(geometry):
    before, made = geometry.singular_values()
    assert before[0] > 1.5 and before[-1] < 0.5
    expected = [np.minimum(before, 1), before / before[0], np.ones_like(before)]
    for values, right in zip(made.values(), expected, strict=True):
        np.testing.assert_allclose(values, right, rtol=2e-3)


def test_paths_show_what_each_place_does(geometry):
    forward, update, penalty = geometry.paths().values()
    norm = lambda path: np.linalg.norm(path, axis=1)
    assert np.all(norm(forward.used) <= 1 + 1e-6)
    # Outside, steps of the raw weight go along the boundary: it stays outside.
    assert np.all(norm(forward.raw) > 1.5)
    assert np.all(norm(update.used)[1:] <= 1 + 1e-6) and norm(update.raw).max() > 1
    # All that is used is raw too, and raw has the steps between.
    assert len(update.raw) == 2 * len(update.used) - 1
    assert 1.01 < norm(penalty.used)[-1] < np.linalg.norm(geometry.GOAL) - 0.1
    nearest = np.array(geometry.GOAL) / np.linalg.norm(geometry.GOAL)
    np.testing.assert_allclose(update.used[-1], nearest, atol=0.1)


def test_pictures_are_small(geometry):
    drawn = geometry.pictures()
    assert list(drawn) == ["sets.svg", "spectra.svg", "places.svg"]
    for text in drawn.values():
        assert "</svg>" in text and len(text) < 400_000
