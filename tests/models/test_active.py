"""The share of active units: those that are outside of a set or on its boundary."""

import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import DTYPES, exact, sample


pytestmark = pytest.mark.usefixtures("quick_compilation")


def active(projection, weight):
    return jax.jit(lambda weight: projection._active(weight))(weight)


_HALF_LONG = [[3.0, 4.0], [0.3, 0.4], [0.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    "projection, weight, expected",
    [
        # The third unit is on the boundary.
        (eqxreg.MaxNorm(1.0, axis="unit"), _HALF_LONG, 2 / 4),
        (eqxreg.MaxNorm(9.0, axis="unit"), _HALF_LONG, 0.0),
        # One norm for all: what is scaled has an entry that is not zero.
        (eqxreg.MaxNorm(1.0), _HALF_LONG, 3 / 4),
        (eqxreg.MaxNorm(1.0, ord=jnp.inf), _HALF_LONG, 2 / 4),
        (eqxreg.MaxNorm(1.0, axis="unit", ord=1), _HALF_LONG, 2 / 4),
        # The third is at the lower bound, the last has no direction to go.
        (eqxreg.MinMaxNorm(1.0, 9.0, axis="unit"), _HALF_LONG, 2 / 4),
        (eqxreg.UnitNorm(axis="unit"), _HALF_LONG, 3 / 4),
        (eqxreg.UnitNorm(), [2.0, 0.0, 1.0], 2 / 3),
        # Entries, not units.
        (eqxreg.NonNegative(), [[-1.0, 2.0], [0.0, 3.0]], 2 / 4),
        (eqxreg.Box(-1.0, 2.0), [[-1.0, 2.0], [0.0, 3.0]], 3 / 4),
        (eqxreg.Box(-jnp.inf, 2.0), [[-1.0, 1.0], [0.0, 3.0]], 1 / 4),
        (eqxreg.Simplex(), [[0.5, 0.5], [0.9, 0.3]], 1.0),
        (eqxreg.SpectralScale(1.0), [[2.0, 0.0], [0.0, 0.5]], 1.0),
        (eqxreg.SpectralScale(3.0), [[2.0, 0.0], [0.0, 0.5]], 0.0),
        (eqxreg.SpectralCap(3.0), [[2.0, 0.0], [0.0, 0.5]], 0.0),
        (eqxreg.Symmetric(), [[1.0, 2.0], [2.0, 1.0]], 0.0),
        (eqxreg.Symmetric(), [[1.0, 2.0], [3.0, 1.0]], 1.0),
        (
            eqxreg.StraightThrough(eqxreg.NonNegative()),
            [[-1.0, 2.0], [0.0, 3.0]],
            2 / 4,
        ),
        # Of shares of one in four, of one in two, the larger.
        (
            eqxreg.Chain(eqxreg.NonNegative(), eqxreg.MaxNorm(1.0, axis="unit")),
            [[-0.1, 0.2], [0.3, 4.0]],
            1 / 2,
        ),
    ],
    ids=str,
)
def test_active_is_the_share_that_is_outside_or_on_the_boundary(
    projection, weight, expected
):
    assert active(projection, jnp.array(weight)) == np.float32(expected)


def test_active_is_the_same_in_a_wrapper(mlp):
    projection = eqxreg.MaxNorm(0.5, axis="unit")
    wrapped = eqxreg.report(eqxreg.constrain(mlp, projection)).rows
    given = eqxreg.report(mlp, projection=projection).rows
    assert [row.active for row in wrapped] == [row.active for row in given]
    assert any(0 < row.active < 1 for row in given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "projection",
    [
        eqxreg.MaxNorm(0.7, axis="unit"),
        eqxreg.MinMaxNorm(9.0, 10.0, axis="unit"),
        eqxreg.UnitNorm(0.7),
        eqxreg.UnitNorm(0.7, axis="unit"),
        eqxreg.SpectralNorm(0.7, method="svd"),
        eqxreg.SpectralCap(0.7),
        eqxreg.Orthogonal(),
    ],
    ids=lambda p: f"{type(p).__name__}-{getattr(p, 'axis', '')}",
)
def test_what_was_projected_is_active(projection, dtype):
    assert active(projection, jax.jit(projection)(sample(dtype))) == 1.0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("projection", [eqxreg.Box(-0.3, 0.7), eqxreg.NonNegative()])
def test_entries_that_were_projected_are_active(projection, dtype):
    raw = sample(dtype)
    expected = np.mean(exact(projection(raw)) != exact(raw))
    assert active(projection, projection(raw)) == np.float32(expected)
