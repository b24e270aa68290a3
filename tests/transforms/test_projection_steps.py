"""Projection after the update: on which steps and of which weights, in half precision,
under `vmap`, and with a bound that follows a schedule."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit
from tables import assert_close, exact
from training import loss, params_of, train


pytestmark = pytest.mark.usefixtures("quick_compilation")


def norms_of(params):
    weights = eqxreg.trainables(params, eqxreg.weights)
    return np.concatenate([np.sqrt((exact(w) ** 2).sum(-1)).ravel() for w in weights])


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("every", [1, 3])
def test_projection_acts_on_every_kth_step_only(every, mlp):
    projection = eqxreg.project(eqxreg.MaxNorm(0.3, axis="unit"), every=every)
    history = train(mlp, optax.chain(optax.adam(0.1), projection), loss, steps=6)
    free = train(mlp, optax.adam(0.1), loss, steps=6)
    for step, params in enumerate(history, start=1):
        if step % every == 0:
            assert norms_of(params).max() <= 0.3
        elif step < every:
            assert_close(params, free[step - 1])
            assert norms_of(params).max() > 0.3
        else:
            assert norms_of(params).max() > 0.3


def test_steps_between_projections_skip_it(mlp):
    projection = eqxreg.project(eqxreg.MaxNorm(0.3, axis="unit"), every=10)
    params = params_of(mlp)
    state = projection.init(params)
    jaxpr = str(jax.make_jaxpr(projection.update)(params, state, params))
    # The norms are within the branches of one `cond`.
    assert jaxpr.count("custom_jvp_call") > 0
    assert "cond[" in jaxpr
    top = jax.make_jaxpr(projection.update)(params, state, params).jaxpr.eqns
    assert not any(eqn.primitive.name == "custom_jvp_call" for eqn in top)


def test_projection_leaves_what_is_not_selected(mlp):
    projection = eqxreg.project(eqxreg.MaxNorm(0.01, axis="unit"))
    params = params_of(mlp)
    updates = jax.tree.map(jnp.ones_like, params)
    new, _ = projection.update(updates, projection.init(params), params)
    for layer in new.layers:
        assert jnp.array_equal(layer.bias, jnp.ones_like(layer.bias))
        assert not jnp.array_equal(layer.weight, jnp.ones_like(layer.weight))


def test_stacked_layers_are_projected_one_by_one(key):
    mlp = eqx.nn.MLP(4, 2, 8, depth=4, scan=True, key=key)
    projection = eqxreg.project(eqxreg.MaxNorm(0.3))
    params = params_of(mlp)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = projection.update(zeros, projection.init(params), params)
    hidden = optax.apply_updates(params, updates).layers[1].weight
    norms = np.sqrt((exact(hidden) ** 2).sum((1, 2)))
    np.testing.assert_allclose(norms, 0.3, rtol=1e-5)


@pytest.mark.parametrize("dtype, rtol", [("bfloat16", 1e-2), ("float16", 2e-3)])
def test_projection_in_half_precision_keeps_dtype_and_nearly_the_bound(dtype, rtol):
    weight = jnp.linspace(-2.0, 2.0, 32).reshape(4, 8).astype(dtype)
    params = {"weight": weight}
    projection = eqxreg.project(eqxreg.MaxNorm(1.0, axis="unit"))
    small = {"weight": jnp.full_like(weight, 1e-3)}
    updates, _ = jit(projection.update)(small, projection.init(params), params)
    new = optax.apply_updates(params, updates)
    assert updates["weight"].dtype == new["weight"].dtype == dtype
    assert norms_of(new).max() <= 1.0 + rtol
    exactly = eqxreg.project_params(new, eqxreg.MaxNorm(1.0, axis="unit"))
    assert norms_of(exactly).max() <= 1.0


@pytest.mark.usefixtures("standard_promotion")
def test_seeds_under_vmap(key):
    projection = eqxreg.project(eqxreg.MaxNorm(0.3, axis="unit"), every=2)
    optimiser = optax.chain(optax.adam(0.1), projection)

    def run(key):
        mlp = eqx.nn.MLP(4, 2, 8, depth=2, key=key)
        params, static = eqx.partition(mlp, eqx.is_inexact_array)

        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: loss(eqx.combine(p, static)))(params)
            updates, state = optimiser.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = params, optimiser.init(params)
        (params, _), _ = jax.lax.scan(step, carry, length=4)
        return params

    params = jit(jax.vmap(run))(jax.random.split(key, 3))
    assert params.layers[0].weight.shape == (3, 8, 4)
    assert norms_of(params).max() <= 0.3


def test_seeds_under_vmap_skip_projections_together():
    # The simplex, for its loop is in the program only if the projection is.
    projection = eqxreg.project(eqxreg.Simplex(), every=3)
    params = {"weight": jnp.ones((2, 5, 4))}
    state = jax.vmap(projection.init)(params)
    update = jax.vmap(projection.update)
    eqns = jax.make_jaxpr(update)(params, state, params).jaxpr.eqns
    [branch] = [eqn for eqn in eqns if eqn.primitive.name == "cond"]
    assert branch.invars[0].aval.shape == ()
    assert not any(eqn.primitive.name == "while" for eqn in eqns)
    # Seeds may be at different steps; each is projected when it is due.
    state = state._replace(step=jnp.asarray([1, 2]))
    updates, state = jit(update)(params, state, params)
    assert jnp.array_equal(updates["weight"][0], params["weight"][0])
    assert not jnp.array_equal(updates["weight"][1], params["weight"][1])
    assert jnp.array_equal(state.step, jnp.asarray([2, 3]))


def test_a_bound_may_follow_a_schedule():
    bound = optax.linear_schedule(4.0, 1.0, 3)
    projection = eqxreg.project(eqxreg.MaxNorm(bound))
    params = {"weight": jnp.full(4, 10.0)}
    state = projection.init(params)
    update = jit(projection.update)
    for expected in (4.0, 3.0, 2.0, 1.0, 1.0):
        updates, state = update({"weight": jnp.zeros(4)}, state, params)
        norm = jnp.linalg.norm(optax.apply_updates(params, updates)["weight"])
        np.testing.assert_allclose(norm, expected, rtol=1e-5)
    assert update._cache_size() == 1
