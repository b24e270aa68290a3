"""The radius within which no input changes its class."""

import math

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jacobians import orthogonal
from quick import jit


pytestmark = pytest.mark.usefixtures("quick_compilation")

nn = eqx.nn


def test_no_input_within_the_radius_changes_the_class(key):
    rng = np.random.default_rng(1)
    layers = []
    for rows, columns in ((8, 2), (8, 8), (3, 8)):
        layers.extend([orthogonal(rng, rows, columns), eqxreg.MaxMin()])
    model = nn.Sequential(layers[:-1])
    x = jnp.asarray(rng.standard_normal((64, 2)), jnp.float32)
    logits = jax.vmap(model)(x)
    radius = eqxreg.certified_radius(logits, eqxreg.lipschitz_bound(model))
    label = jnp.argmax(logits, axis=-1)

    def margin(x, label):
        logits = model(x)
        others = jnp.where(jnp.arange(3) == label, -jnp.inf, logits)
        return logits[label] - jnp.max(others)

    @jit
    @jax.vmap
    def attack(x, label, radius, start):
        def step(_, moved):
            slope = jax.grad(margin)(x + moved, label)
            moved = moved - 0.2 * radius * slope / (jnp.linalg.norm(slope) + 1e-12)
            return moved * jnp.minimum(1, radius / (jnp.linalg.norm(moved) + 1e-12))

        moved = jax.lax.fori_loop(0, 40, step, 1e-3 * start)
        return margin(x + moved, label)

    start = jax.random.normal(key, x.shape)
    assert jnp.all(attack(x, label, 0.999 * radius, start) > 0)
    # The radius is not idle: somewhat further out, classes do change.
    assert jnp.any(attack(x, label, 4 * radius, start) < 0)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_radius_is_that_of_the_formula_rounded_down(dtype):
    drawn = 10 * np.random.default_rng(0).standard_normal((4, 50, 5))
    logits = jnp.asarray(drawn, dtype)
    radius = eqxreg.certified_radius(logits, 1.7)
    wide = np.sort(np.asarray(logits).astype(np.float64), axis=-1)
    truth = (wide[..., -1] - wide[..., -2]) / (math.sqrt(2) * 1.7)
    assert radius.shape == (4, 50) and radius.dtype == jnp.float32
    assert np.all((truth * (1 - 1e-5) <= radius) & (radius <= truth))


@pytest.mark.usefixtures("x64")
def test_a_radius_of_double_precision_logits_is_in_double_precision():
    logits = jnp.array([1.0, 1.0 + 1e-12])
    radius = eqxreg.certified_radius(logits, jnp.float32(0.5))
    assert radius.dtype == jnp.float64
    margin = float(logits[1]) - 1.0
    np.testing.assert_allclose(radius, margin * math.sqrt(2), rtol=1e-12)
    assert radius <= margin * math.sqrt(2)


def test_a_tie_has_the_radius_zero_and_a_gradient():
    logits = jnp.array([1.0, 1.0, 0.0])
    radius, slope = jax.value_and_grad(eqxreg.certified_radius)(logits, 1.0)
    assert radius == 0
    np.testing.assert_allclose(jnp.linalg.norm(slope), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("logits", "lipschitz", "expected"),
    [
        ([1.0, 0.0], 0.0, jnp.inf),
        ([1.0, 1.0], 0.0, 0.0),
        ([1.0, -jnp.inf], 1.0, jnp.inf),
        ([jnp.inf, 0.0], 1.0, jnp.nan),
        ([jnp.nan, 0.0, 1.0], 1.0, jnp.nan),
        ([1.0, 0.0], jnp.inf, 0.0),
        ([1.0, 0.0], jnp.nan, jnp.nan),
    ],
)
def test_a_radius_is_sound_for_extreme_values(logits, lipschitz, expected):
    radius = eqxreg.certified_radius(jnp.array(logits), jnp.array(lipschitz))
    np.testing.assert_array_equal(radius, expected)


@pytest.mark.parametrize(
    ("logits", "lipschitz", "error", "message"),
    [
        (jnp.ones(()), 1.0, ValueError, r"two classes or more, got shape \(\)"),
        (jnp.ones((3, 1)), 1.0, ValueError, r"two classes or more, got shape \(3, 1\)"),
        (jnp.ones(3, int), 1.0, TypeError, "floating JAX array, got one of int32"),
        (np.ones(3), 1.0, TypeError, "floating JAX array, got a numpy.ndarray"),
        (jnp.ones(3), 0.0, ValueError, r"`lipschitz` must be positive, got 0\.0"),
        (jnp.ones(3), -1, ValueError, "`lipschitz` must be positive, got -1"),
        (jnp.ones(3), math.nan, ValueError, "`lipschitz` must be positive, got nan"),
    ],
)
def test_the_radius_of_what_is_no_logits_is_an_error(logits, lipschitz, error, message):
    with pytest.raises(error, match=message):
        eqxreg.certified_radius(logits, lipschitz)
