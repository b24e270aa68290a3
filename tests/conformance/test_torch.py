"""PyTorch, which is not installed: what its manual documents and a closed form has."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import exact, sample


pytestmark = pytest.mark.usefixtures("quick_compilation")


l1 = eqxreg.MaxNorm(5.0, axis="unit", ord=1)


def renorm(weight, p, maxnorm):
    """`torch.renorm(weight, p, 0, maxnorm)`, by its manual: "If the norm of a row is
    lower than maxnorm, the row is unchanged"."""
    weight = np.asarray(weight)
    norms = np.linalg.norm(weight, p, axis=1, keepdims=True)
    scaled = weight * (maxnorm / (norms + np.float32(1e-7)))
    return np.where(norms > maxnorm, scaled, weight)


def test_max_norm_of_units_is_renorm_and_leaves_the_same_bits():
    weight = sample("float32", shape=(8, 5)) * jnp.linspace(0.1, 2.0, 8)[:, None]
    expected = renorm(weight, 2, 2.0)
    actual = np.asarray(jax.jit(eqxreg.MaxNorm(2.0, axis="unit"))(weight))
    np.testing.assert_allclose(actual, expected, rtol=3e-6)
    inside = np.all(expected == weight, axis=1)
    assert 0 < inside.sum() < 8
    assert np.array_equal(actual[inside], expected[inside])


def test_the_example_in_the_manual_of_renorm():
    # `torch.renorm(x, 1, 0, 5)`, as printed there.
    x = jnp.asarray([[1.0] * 3, [2.0] * 3, [3.0] * 3])
    expected = [[1.0] * 3, [1.6667] * 3, [1.6667] * 3]
    actual = jax.jit(l1)(x)
    np.testing.assert_allclose(actual, expected, atol=5e-5)


def test_renorm_scales_where_the_nearest_point_of_the_l1_ball_is_sparser():
    x = jnp.asarray([[4.0, 3.0, 0.5]])
    np.testing.assert_allclose(
        renorm(x, 1, 5.0), [[20 / 7.5, 15 / 7.5, 2.5 / 7.5]], rtol=1e-6
    )
    nearest = jax.jit(l1)(x)
    np.testing.assert_allclose(nearest, [[3.0, 2.0, 0.0]], rtol=1e-5)


def test_the_example_in_the_manual_of_weight_norm(key):
    # `torch.nn.utils.parametrizations.weight_norm(nn.Linear(20, 40), name='weight')`
    # has sizes `[40, 1]` and `[40, 20]`, and the layer keeps its weight.
    linear = eqx.nn.Linear(20, 40, use_bias=False, key=key)
    wrapped = eqxreg.WeightNormConstraint(linear, "weight")
    shapes = [array.shape for array in eqxreg.trainables(wrapped)]
    assert sorted(shapes) == [(40, 1), (40, 20)]
    assert jnp.array_equal(eqx.filter_jit(eqxreg.bake)(wrapped).weight, linear.weight)


def test_the_example_in_the_manual_of_orthogonal():
    # `torch.dist(Q.T @ Q, torch.eye(20))` of `orthogonal(nn.Linear(20, 40))` is printed
    # as 4.9332e-07.
    q = exact(jax.jit(eqxreg.Orthogonal())(sample("float32", shape=(40, 20))))
    assert np.linalg.norm(q.T @ q - np.eye(20)) < 2e-6
