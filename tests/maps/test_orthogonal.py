"""Orthogonal weights: the nearest one, almost orthogonal ones, and charts."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import filter_jit, jit
from spectra import (
    MATRICES,
    WAYS,
    compiled,
    each_matrix,
    function_of,
    orthogonal,
    singular_values,
)
from tables import exact, sample


FULL_RANK = [name for name in MATRICES if name not in ("rank three", "fast decay")]


@pytest.mark.parametrize("way", WAYS)
@each_matrix
def test_the_polar_factor_is_orthogonal_and_nearest(name, way):
    weight = MATRICES[name]
    p = compiled(eqxreg.Orthogonal(method=way))
    result = p(weight)
    np.testing.assert_allclose(singular_values(result), 1.0, atol=5e-6)
    assert jnp.array_equal(p(result), result)
    if name in FULL_RANK:
        expected = function_of(weight, np.ones_like)
        np.testing.assert_allclose(result, expected, atol=1e-4)
    else:
        # There are many; each is as far from the weight as the singular values say.
        apart = np.linalg.norm(exact(result) - exact(weight))
        shortest = np.linalg.norm(singular_values(weight) - 1)
        assert apart == pytest.approx(shortest, rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_near_the_set_an_orthogonal_weight_takes_products_only(way):
    near = jnp.asarray(orthogonal(48) + 1e-3, "float32")
    p = compiled(eqxreg.Orthogonal(method=way))
    expected = function_of(near, np.ones_like)
    np.testing.assert_allclose(p(near), expected, atol=2e-6)


def test_on_the_set_the_derivative_of_the_polar_factor_is_tangential():
    q = jnp.asarray(orthogonal(5)[:, :3], "float32")
    tangent = sample("float32", shape=(5, 3))
    value, change = jax.jvp(eqxreg.Orthogonal(), (q,), (tangent,))
    q64, t64 = exact(q), exact(tangent)
    sym = (q64.T @ t64 + t64.T @ q64) / 2
    assert jnp.array_equal(value, q)
    np.testing.assert_allclose(change, t64 - q64 @ sym, atol=1e-5)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (25, 25)])
def test_almost_orthogonal_never_stretches_and_keeps_orthogonal_weights(shape):
    p = jax.jit(eqxreg.AlmostOrthogonal())
    for scale in (1e-20, 1.0, 1e20):
        assert singular_values(p(sample("float32", scale, shape)))[0] <= 1
    u = orthogonal(30)[: shape[0], : shape[1]] if min(shape) == 20 else orthogonal(25)
    q = eqxreg.Orthogonal()(jnp.asarray(u, "float32"))
    result = p(q)
    np.testing.assert_allclose(result, q, atol=2e-5 if min(shape) == 20 else 5e-6)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_almost_orthogonal_inverts(shape):
    p = eqxreg.AlmostOrthogonal()
    weight = p(sample("float32", shape=shape))
    np.testing.assert_allclose(p(p.inverse(weight)), weight, atol=1e-5)
    # Of any other weight, a multiple stays.
    other = sample("float32", shape=shape, seed=1)
    ratio = p(p.inverse(other)) / other
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-3)


CHARTS = {"cayley": eqxreg.Cayley(), "exp": eqxreg.MatrixExp()}
each_chart = pytest.mark.parametrize("p", CHARTS.values(), ids=CHARTS.keys())


@each_chart
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (7, 1)])
def test_charts_give_orthogonal_weights_and_invert(p, shape):
    there, back = jit(lambda raw: p(raw)), jit(lambda weight: p.inverse(weight))
    weight = there(sample("float32", 0.4, shape))
    np.testing.assert_allclose(singular_values(weight), 1.0, atol=2e-6)
    np.testing.assert_allclose(there(back(weight)), weight, atol=1e-3)


@each_chart
@pytest.mark.parametrize("sign", [1, -1])
def test_charts_keep_a_weight_of_either_determinant(p, sign):
    q = orthogonal(6)
    q[0] *= sign * np.sign(np.linalg.det(q))
    linear = eqx.nn.Linear(6, 6, use_bias=False, key=jax.random.key(0))
    linear = eqx.tree_at(lambda layer: layer.weight, linear, jnp.asarray(q, "float32"))
    wrapped = eqxreg.Constraint(linear, "weight", p)
    assert jnp.array_equal(wrapped.weight, jnp.zeros((6, 6)))
    np.testing.assert_allclose(eqxreg.bake(wrapped).weight, q, atol=1e-6)


@each_chart
def test_charts_start_from_the_nearest_orthogonal_weight_and_train(p):
    linear = eqx.nn.Linear(4, 6, key=jax.random.key(0))
    wrapped = eqxreg.Constraint(linear, "weight", p)
    nearest = function_of(linear.weight, np.ones_like)
    np.testing.assert_allclose(eqxreg.bake(wrapped).weight, nearest, atol=1e-5)
    target = jnp.asarray(orthogonal(6, 3)[:, :4], "float32")
    optimiser = optax.sgd(0.2)
    chosen = eqxreg.trainable(wrapped)
    assert len(eqxreg.trainables(wrapped)) == 2  # raw weight and bias; not the base

    @filter_jit
    def step(model, state):
        params, static = eqx.partition(model, chosen)
        distance = lambda params: jnp.sum(
            (eqxreg.bake(eqx.combine(params, static)).weight - target) ** 2
        )
        value, grads = jax.value_and_grad(distance)(params)
        updates, state = optimiser.update(grads, state)
        return eqx.combine(eqx.apply_updates(params, updates), static), state, value

    state = optimiser.init(eqx.filter(wrapped, chosen))
    values = []
    for _ in range(60):
        wrapped, state, value = step(wrapped, state)
        values.append(float(value))
    assert values[-1] < 0.2 * values[0]
    weight = eqxreg.bake(wrapped).weight
    np.testing.assert_allclose(singular_values(weight), 1.0, atol=2e-6)


@each_chart
def test_a_weight_out_of_reach_of_a_chart_has_no_inverse(p):
    message = "needs an orthogonal weight that is not opposite"
    with pytest.raises(ValueError, match=message):
        p.inverse(2 * jnp.eye(3))
    with pytest.raises(ValueError, match=message):
        p.inverse(jnp.diag(jnp.asarray([1.0, 1.0, -1.0])))
