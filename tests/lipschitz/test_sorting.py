"""Activations that sort groups of features: their values, derivatives and errors."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit


pytestmark = pytest.mark.usefixtures("quick_compilation")

nn = eqx.nn


@pytest.mark.parametrize("shape", [(12,), (12, 5), (12, 3, 4)])
@pytest.mark.parametrize(
    ("layer", "size"), [(eqxreg.MaxMin(), 2), (eqxreg.GroupSort(3), 3)], ids=str
)
def test_groups_of_features_are_sorted(layer, size, shape, key):
    x = jax.random.normal(key, shape)
    grouped = np.asarray(x).reshape(12 // size, size, *shape[1:])
    expected = np.sort(grouped, axis=1).reshape(shape)
    np.testing.assert_array_equal(layer(x, key=key), expected)


@pytest.mark.parametrize("layer", [eqxreg.MaxMin(), eqxreg.GroupSort(4)], ids=str)
def test_sorting_keeps_the_norm_of_a_gradient(layer, key):
    x, cotangent = jax.random.normal(key, (2, 8))
    gradient = jax.vjp(layer, x)[1](cotangent)[0]
    np.testing.assert_array_equal(jnp.sort(gradient), jnp.sort(cotangent))


@pytest.mark.parametrize("layer", [eqxreg.MaxMin(), eqxreg.GroupSort(4)], ids=str)
def test_the_derivative_at_ties_is_an_average_of_permutations(layer):
    jacobian = jit(jax.jacobian(layer))(jnp.zeros(4))
    np.testing.assert_allclose(jnp.sum(jacobian, axis=0), 1)
    np.testing.assert_allclose(jnp.sum(jacobian, axis=1), 1)
    assert jnp.all(jacobian >= 0)


@pytest.mark.parametrize("size", [1, 0, -2, True])
def test_a_group_has_two_features_or_more(size):
    with pytest.raises(ValueError, match="`group_size` must be an int, 2 or more, got"):
        eqxreg.GroupSort(size)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (eqxreg.MaxMin(), (3,), "`MaxMin` .*multiple of 2, .*with 3. Change the width"),
        (eqxreg.GroupSort(4), (6, 4), "`GroupSort` .*multiple of 4, .*with 6"),
        (eqxreg.MaxMin(), (), r"of shape \(\).*`eqx\.nn\.Sequential`"),
    ],
)
def test_features_that_do_not_fill_groups_are_an_error(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        layer(jnp.zeros(shape))
