"""Optax: the projections, decay and documented numbers that eqxreg has in common with
it, and what is different on purpose."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import projections
from tables import assert_close, exact, sample


# Projections of a single weight, which to Optax is a tree of one leaf.
SAME = {
    "box": (
        lambda w: projections.projection_box(w, -0.5, 0.7),
        eqxreg.Box(-0.5, 0.7),
    ),
    "hypercube": (
        lambda w: projections.projection_hypercube(w, 0.7),
        eqxreg.Box(0.0, 0.7),
    ),
    "non_negative": (projections.projection_non_negative, eqxreg.NonNegative()),
    "simplex": (
        lambda w: projections.projection_simplex(w, 0.7),
        eqxreg.Simplex(0.7, axis=None),
    ),
    "l1_ball": (
        lambda w: projections.projection_l1_ball(w, 2.0),
        eqxreg.MaxNorm(2.0, ord=1),
    ),
    "l2_ball": (
        lambda w: projections.projection_l2_ball(w, 2.0),
        eqxreg.MaxNorm(2.0),
    ),
    "linf_ball": (
        lambda w: projections.projection_linf_ball(w, 0.7),
        eqxreg.MaxNorm(0.7, ord=jnp.inf),
    ),
    "l2_sphere": (
        lambda w: projections.projection_l2_sphere(w, 2.0),
        eqxreg.UnitNorm(2.0),
    ),
}


def norm(weight, ord=2):
    return np.linalg.norm(exact(weight).ravel(), ord)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", SAME)
def test_projections_and_their_gradients_agree(name):
    cotangent = sample("float32", seed=1)

    @jax.jit
    def value_and_gradient(weight):
        def both(fn):
            value, pull = jax.vjp(fn, weight)
            return value, pull(cotangent)[0]

        return [both(fn) for fn in SAME[name]]

    for scale in (0.01, 1.0):
        theirs, ours = value_and_gradient(sample("float32", scale))
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b)


# The docstrings of `projection_simplex` and `projection_l1_ball`.
DOCUMENTED = {
    "simplex": (projections.projection_simplex, eqxreg.Simplex()),
    "l1_ball": (projections.projection_l1_ball, eqxreg.MaxNorm(1.0, ord=1)),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", DOCUMENTED)
def test_optax_documents_sums_above_the_bound_and_here_there_are_none(name):
    theirs, ours = DOCUMENTED[name]
    tree = jax.jit(theirs)({"w": jnp.array([2.5, 3.2]), "b": 0.5})
    together = np.asarray([tree["b"], *tree["w"]])
    assert f"{together.sum():.7f}" == "1.0000002"
    projected = jax.jit(ours)(jnp.array([0.5, 2.5, 3.2]))
    assert 1 - 1e-5 <= norm(projected, 1) <= 1
    np.testing.assert_allclose(projected, together, rtol=5e-6)


def test_the_norm_is_that_of_the_tree_in_optax_and_of_each_weight_here():
    tree = {"weight": jnp.array([3.0]), "kernel": jnp.array([4.0])}
    theirs = jax.jit(projections.projection_l2_ball)(tree)
    assert theirs == pytest.approx({"weight": 0.6, "kernel": 0.8}, rel=1e-5)
    ours = jax.jit(lambda t: eqxreg.project_params(t, eqxreg.MaxNorm(1.0)))(tree)
    assert ours == pytest.approx({"weight": 1.0, "kernel": 1.0}, rel=1e-5)


def test_optax_exceeds_the_bound_and_is_not_idempotent():
    theirs, ours = map(jax.jit, (projections.projection_l2_ball, eqxreg.MaxNorm(1.0)))
    # Which of these exceed it depends on the order of a sum, and so on the processor.
    weights = [sample("float32", shape=(64, 32), seed=seed) for seed in range(16)]
    of_theirs, of_ours = ([p(w) for w in weights] for p in (theirs, ours))
    assert any(norm(once) > 1 for once in of_theirs)
    assert any(np.any(theirs(once) != once) for once in of_theirs)
    assert all(norm(once) <= 1 for once in of_ours)
    assert all(np.array_equal(ours(once), once) for once in of_ours)


def test_the_sphere_is_not_a_number_at_zero_in_optax_and_the_identity_here():
    zero = jnp.zeros(3)
    sums = [lambda w, p=p: p(w).sum() for p in SAME["l2_sphere"]]
    theirs, ours = (jax.jit(jax.value_and_grad(fn))(zero) for fn in sums)
    assert all(np.all(np.isnan(number)) for number in theirs)
    assert ours[0] == 0 and np.all(ours[1] == 1)


@pytest.mark.parametrize("size, lost", [(1e25, 0.0), (1e-25, np.inf)])
def test_squares_overflow_and_underflow_in_optax_only(size, lost):
    weight = jnp.full(4, size)
    theirs, ours = (jax.jit(p)(weight) for p in SAME["l2_sphere"])
    assert np.all(theirs == lost)
    np.testing.assert_allclose(ours, 1.0, rtol=1e-5)


def test_infinities_are_hidden_by_optax_and_stay_visible_here():
    weight = jnp.array([jnp.inf, -jnp.inf, 0.5])
    assert projections.projection_box(weight, -1.0, 1.0).tolist() == [1.0, -1.0, 0.5]
    assert jnp.array_equal(eqxreg.Box(-1.0, 1.0)(weight), weight)


# Transforms


def trajectory(optimiser, loss, params, steps):
    state, history = optimiser.init(params), []

    @jax.jit
    def step(params, state):
        updates, state = optimiser.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        history.append(params)
    return history


def test_non_negative_parameters_have_the_same_trajectory():
    target = {"weight": sample("float32", shape=(5, 4)), "bias": jnp.array([-1.0, 1.0])}
    params = jax.tree.map(jnp.ones_like, target)

    def loss(params):
        distances = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 2), params, target)
        return sum(jax.tree.leaves(distances))

    def run(last):
        return trajectory(optax.chain(optax.sgd(0.1), last), loss, params, 10)

    theirs = run(optax.keep_params_nonnegative())
    ours = run(eqxreg.project(eqxreg.NonNegative(), mask=eqxreg.trainable))
    weights_only = run(eqxreg.project(eqxreg.NonNegative()))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert_close(a, b)
        assert jnp.array_equal(a == 0, b == 0)
    # Optax acts on everything, and eqxreg by default on weights.
    assert theirs[-1]["bias"][0] == 0 and weights_only[-1]["bias"][0] < 0


@pytest.mark.parametrize("rate", [0.1, optax.linear_schedule(0.1, 0.3, 2)])
def test_decay_is_that_of_optax(rate):
    params = {"weight": sample("float32"), "bias": sample("float32", seed=1)}
    updates = jax.tree.map(jnp.cos, params)
    decay = eqxreg.weight_decay(rate)
    state = decay.init(params)
    for step in range(2):
        # By number, for Optax before 0.2.7 forgets to count.
        now = float(rate(step)) if callable(rate) else rate
        theirs = optax.add_decayed_weights(now)
        expected, _ = theirs.update(updates, theirs.init(params), params)
        actual, state = decay.update(updates, state, params)
        for name in params:
            assert_close(actual[name], expected[name])


@pytest.mark.usefixtures("standard_promotion")
def test_the_numbers_in_the_docstring_of_adamw():
    decoupled = optax.chain(
        optax.scale_by_adam(),
        eqxreg.weight_decay(1e-4),
        optax.scale_by_learning_rate(0.003),
    )
    square = lambda x: jnp.sum(x**2)
    history = trajectory(decoupled, square, jnp.array([1.0, 2.0, 3.0]), 5)
    documented = ["1.40E+01", "1.39E+01", "1.39E+01", "1.39E+01", "1.38E+01"]
    assert [f"{square(x):.2E}" for x in history] == documented


def matrices(tree):
    """The mask that is usual with Optax."""
    return jax.tree.map(lambda p: getattr(p, "ndim", 0) > 1, tree)


def stack(build, key):
    return eqx.filter_vmap(build)(jax.random.split(key, 2))


NOT_WEIGHTS = {
    "bias of a convolution": (
        lambda key: eqx.nn.Conv2d(2, 3, 3, key=key),
        lambda layer: layer.bias,
    ),
    "bias in a stack": (
        lambda key: stack(lambda k: eqx.nn.Linear(4, 3, key=k), key),
        lambda layer: layer.bias,
    ),
    "scale in a stack": (
        lambda key: stack(lambda k: eqx.nn.LayerNorm(4), key),
        lambda layer: layer.weight,
    ),
    "gain of weight normalisation": (
        lambda key: eqx.nn.WeightNorm(eqx.nn.Linear(4, 3, key=key)),
        lambda layer: layer.g,
    ),
}


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_the_usual_mask_takes_for_a_weight_what_is_none(name, key):
    build, find = NOT_WEIGHTS[name]
    layer = eqx.filter_eval_shape(build, key)
    assert find(matrices(layer))
    assert not find(eqxreg.weights(layer))


def test_neither_optax_nor_eqxreg_decays_the_bound_of_a_wrapper(key):
    linear = eqx.nn.Linear(4, 3, key=key)
    wrapped = eqxreg.MaxNormConstraint(linear, "weight", jnp.asarray(2.0))
    params = eqx.filter(wrapped, eqx.is_inexact_array)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for build in (optax.add_decayed_weights, eqxreg.weight_decay):
        decay = build(0.1)
        updates, _ = decay.update(zeros, decay.init(params), params)
        assert jnp.all(updates.weight == jnp.float32(0.1) * params.weight)
        after = eqx.apply_updates(wrapped, updates)
        assert after.max_norm == 2.0 and not jnp.any(updates.weight == 0)


def test_a_mask_that_selects_nothing_is_silent_in_optax_and_an_error_here():
    params = {"weight": jnp.ones(3)}
    nothing = lambda tree: jax.tree.map(lambda _: False, tree)
    theirs = optax.add_decayed_weights(0.1, mask=nothing)
    updates, _ = theirs.update(params, theirs.init(params), params)
    assert jnp.array_equal(updates["weight"], params["weight"])
    with pytest.raises(ValueError, match="selects nothing"):
        eqxreg.weight_decay(0.1, mask=nothing).init(params)
