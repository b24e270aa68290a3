"""Projection after the update: momentum, averages, and bounds that are relative to the
initial weights."""

import functools as ft

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import filter_jit, jit
from tables import assert_close, exact, sample


pytestmark = pytest.mark.usefixtures("quick_compilation")


def params_of(model):
    return eqx.filter(model, eqx.is_inexact_array)


# Momentum


def ball(w, radius=1.0):
    """The projection onto a ball, in numpy."""
    return w * min(1.0, radius / max(np.linalg.norm(w), 1e-300))


def heavy_ball(gradient, w, rate, beta, steps, *, tangent, every=1):
    """Projected gradient descent with momentum, whose velocity is told what the
    projection took, or is not."""
    velocity, seen = np.zeros_like(w), []
    for step in range(1, steps + 1):
        velocity = beta * velocity - rate * gradient(w)
        target = w + velocity
        w = ball(target) if step % every == 0 else target
        if tangent:
            velocity = velocity - (target - w)
        seen.append(w)
    return np.stack(seen)


def trajectory(optimiser, gradient, w, steps):
    params = {"weight": jnp.asarray(w)}
    state, seen = optimiser.init(params), []

    @jit
    def step(params, state):
        grads = {"weight": gradient(params["weight"])}
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        seen.append(np.asarray(params["weight"]))
    return np.stack(seen)


A = np.diag([1.0, 4.0, 10.0])
TARGET = np.array([1.5, -1.0, 0.3])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("momentum", ["keep", "tangent"])
def test_momentum_is_as_if_the_velocity_knew(momentum, every):
    gradient = lambda w: A @ (w - TARGET)
    start = np.array([0.1, 0.2, 0.3])
    optimiser = optax.chain(
        optax.sgd(0.05, momentum=0.8),
        eqxreg.project(eqxreg.MaxNorm(1.0), every, momentum=momentum, b1=0.8),
    )
    actual = trajectory(optimiser, gradient, start, 40)
    expected = heavy_ball(
        gradient, start, 0.05, 0.8, 40, tangent=momentum == "tangent", every=every
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("standard_promotion", "x64")
def test_tangent_momentum_leaves_the_boundary_when_the_gradient_turns():
    """A weight is pushed against the ball for 30 steps, and pulled back for 60."""

    def steps_on_the_boundary(optimiser, momentum):
        chain = optax.chain(
            optimiser,
            eqxreg.project(eqxreg.MaxNorm(1.0), momentum=momentum, b1=0.9),
        )
        params = {"weight": jnp.asarray([0.9, 0.0])}
        state, seen = chain.init(params), []
        update = jit(chain.update)
        for step in range(60):
            push = -1.0 if step < 30 else 1.0
            grads = {"weight": jnp.asarray([push, 0.0])}
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            seen.append(float(params["weight"][0]))
        return int(np.sum(np.asarray(seen[30:]) > 1 - 1e-4))

    for optimiser in (optax.sgd(0.01, momentum=0.9), optax.adam(0.01)):
        kept = steps_on_the_boundary(optimiser, "keep")
        tangent = steps_on_the_boundary(optimiser, "tangent")
        assert kept == 6 and tangent == 0


@pytest.mark.usefixtures("standard_promotion")
def test_inside_the_set_tangent_momentum_changes_no_bit(key):
    mlp = eqx.nn.MLP(4, 2, 8, depth=1, key=key)
    grads = jax.tree.map(jnp.ones_like, params_of(mlp))
    new = []
    for momentum in ("keep", "tangent"):
        optimiser = optax.chain(
            optax.adam(1e-2),
            eqxreg.project(eqxreg.MaxNorm(9.0), momentum=momentum),
        )
        params = params_of(mlp)
        state = optimiser.init(params)
        for _ in range(3):
            updates, state = optimiser.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        new.append(params)
    assert eqx.tree_equal(*new)


# Averages


@ft.cache
def points_of_a_run(p, steps=12):
    weight = sample("float32", 0.5, shape=(8, 6))
    optimiser = optax.chain(optax.sgd(0.5), eqxreg.project(p))
    params, points = {"weight": weight}, []
    state, update = optimiser.init(params), jit(optimiser.update)
    for step in range(steps):
        grads = {"weight": sample("float32", shape=(8, 6), seed=step)}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        points.append(params)
    return tuple(points)


def ema(points):
    average = points[0]
    for params in points:
        average = optax.incremental_update(params, average, 0.1)
    return average


def polyak(points):
    return jax.tree.map(lambda *ws: sum(ws) / len(ws), *points)


def swa(points):
    return polyak(points[1::3])


@pytest.mark.parametrize("average", [ema, swa, polyak], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "p, is_convex",
    [
        (eqxreg.MaxNorm(0.7, axis="unit"), True),
        (eqxreg.SpectralCap(0.7), True),
        (eqxreg.NonNegative(), True),
        (eqxreg.UnitNorm(0.7, axis="unit"), False),
        (eqxreg.Orthogonal(), False),
    ],
    ids=lambda p: type(p).__name__,
)
def test_an_average_is_kept_in_the_set(p, is_convex, average):
    averaged = average(points_of_a_run(p))
    # Points of a convex set have their averages in it; of a sphere, inside the sphere.
    assert bool(p.contains(averaged["weight"], tol=1e-5)) == is_convex
    kept = eqxreg.project_params(averaged, p)
    assert p.contains(kept["weight"])


# Relative bounds


RELATIVE = {
    "unit_norm": (eqxreg.UnitNorm(axis="unit"), 1.0, 1.0),
    "unit_norm-whole": (eqxreg.UnitNorm(), 1.0, 1.0),
    "max_norm": (eqxreg.MaxNorm(1.5, axis="unit"), None, 1.5),
    "max_norm-array": (eqxreg.MaxNorm(jnp.asarray(1.5)), None, 1.5),
    "min_max": (eqxreg.MinMaxNorm(0.5, 1.5, axis="unit"), 0.5, 1.5),
    "spectral_norm": (eqxreg.SpectralNorm(), 1.0, 1.0),
    "spectral_scale": (eqxreg.SpectralScale(1.5), None, 1.5),
    "spectral_cap": (eqxreg.SpectralCap(1.5), None, 1.5),
}


def sizes_of(p, weight):
    weight = exact(weight)
    if "Spectral" in type(p).__name__:
        return np.linalg.svd(weight.reshape(len(weight), -1), compute_uv=False)[:1]
    axes = tuple(range(1, weight.ndim)) if p.axis == "unit" else None
    return np.sqrt((np.abs(weight) ** 2).sum(axes))


@pytest.mark.parametrize("dtype, rtol", [("float32", 2e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("name", list(RELATIVE))
def test_relative_bounds_are_those_times_the_initial_norms(name, dtype, rtol):
    p, low, high = RELATIVE[name]
    weight = sample(dtype)
    bound, raw = eqxreg.Relative(p).bind(weight)
    assert raw is weight
    compiled = jax.jit(lambda weight: bound(weight))
    # The first weight is at one, and stays as it is.
    assert jnp.array_equal(compiled(weight), weight)
    for factor in (0.1, 3.0):
        actual = compiled((weight * factor).astype(dtype))
        ratio = sizes_of(p, actual) / sizes_of(p, weight)
        expected = np.clip(factor, low, high)
        np.testing.assert_allclose(ratio, expected, rtol=rtol)
        assert bound.contains(actual)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("axis", [None, "unit"])
def test_norm_fixed_training_keeps_every_initial_norm(axis, key):
    mlp = eqx.nn.MLP(4, 2, 8, depth=3, scan=True, key=key)
    p = eqxreg.Relative(eqxreg.UnitNorm(axis=axis))
    for inner in (optax.adamw(0.1), optax.contrib.muon(0.1)):
        optimiser = optax.chain(inner, eqxreg.project(p))
        params = params_of(mlp)
        state = optimiser.init(params)
        update = jit(optimiser.update)
        for step in range(4):
            grads = jax.tree.map(
                lambda w: sample("float32", shape=w.shape, seed=step),  # noqa: B023
                params,
            )
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        pairs = [
            (exact(new), exact(old))
            for new, old in zip(
                eqxreg.trainables(params, eqxreg.weights),
                eqxreg.trainables(mlp, eqxreg.weights),
                strict=True,
            )
        ]
        axes = (-1,) if axis == "unit" else (-2, -1)
        for new, old in pairs:
            norms = [np.sqrt((w**2).sum(axes)) for w in (new, old)]
            np.testing.assert_allclose(*norms, rtol=1e-5)
            assert not np.allclose(new, old, rtol=0.1)


def test_the_hyperball_step_is_its_formula():
    """W <- R N(W - eta R N(U)), with N for normalised."""
    weight, direction = sample("float32"), sample("float32", seed=1)
    optimiser = optax.chain(
        optax.scale_by_trust_ratio(),
        optax.scale_by_learning_rate(0.3),
        eqxreg.project(eqxreg.Relative(eqxreg.UnitNorm())),
    )
    params = {"weight": weight}
    state = optimiser.init(params)
    w = exact(weight)
    radius = np.linalg.norm(w)
    for _ in range(3):
        updates, state = optimiser.update({"weight": direction}, state, params)
        params = optax.apply_updates(params, updates)
        u = exact(direction)
        w = w - 0.3 * radius * u / np.linalg.norm(u)
        w = radius * w / np.linalg.norm(w)
    assert_close(params["weight"], w)


def test_a_relative_bound_may_follow_a_schedule():
    p = eqxreg.Relative(eqxreg.MaxNorm(optax.linear_schedule(2.0, 1.0, 2)))
    projection = eqxreg.project(p)
    params = {"weight": jnp.asarray([0.6, 0.8])}
    state = projection.init(params)
    update = jit(projection.update)
    for expected in (2.0, 1.5, 1.0, 1.0):
        large = jax.tree.map(lambda w: 10 * w, params)
        updates, state = update(large, state, params)
        norm = jnp.linalg.norm(optax.apply_updates(params, updates)["weight"])
        np.testing.assert_allclose(norm, expected, rtol=1e-5)
    assert update._cache_size() == 1


def test_a_relative_bound_in_a_wrapper_is_not_trained(key):
    p = eqxreg.Relative(eqxreg.MaxNorm(1.5, axis="unit"))
    for build in (
        lambda key: eqx.nn.Linear(4, 3, key=key),
        lambda key: eqx.filter_vmap(lambda k: eqx.nn.Linear(4, 3, key=k))(
            jax.random.split(key, 2)
        ),
    ):
        layer = build(key)
        wrapped = eqxreg.constrain({"layer": layer}, p)["layer"]
        assert jnp.array_equal(eqxreg.bake(wrapped).weight, layer.weight)
        large = eqx.tree_at(lambda t: t.layer.weight, wrapped, 9 * layer.weight)
        baked = filter_jit(eqxreg.bake)(large)
        np.testing.assert_allclose(baked.weight, 1.5 * layer.weight, rtol=1e-5)
        assert len(eqxreg.trainables(wrapped)) == 2
        gradient = eqx.filter_grad(lambda w: jnp.sum(eqxreg.bake(w).weight ** 3))
        grads = filter_jit(gradient)(large)
        assert jax.tree.leaves(grads.parametrizations) == []


def test_relative_maps_within_others():
    inner = eqxreg.Relative(eqxreg.MaxNorm(1.5))
    weight = jnp.asarray([0.6, -0.8])
    for p in (eqxreg.StraightThrough(inner), eqxreg.Chain(inner, eqxreg.Box(-1, 1))):
        bound, _ = p.bind(weight)
        np.testing.assert_allclose(
            bound(9 * weight),
            [0.9, -1.2 + 0.2 * (isinstance(p, eqxreg.Chain))],
            rtol=1e-5,
        )
        projection = eqxreg.project(p)
        params = {"weight": weight}
        updates, _ = projection.update(
            {"weight": 8 * weight}, projection.init(params), params
        )
        np.testing.assert_allclose(
            optax.apply_updates(params, updates)["weight"], bound(9 * weight), rtol=1e-5
        )


def test_a_unit_that_is_zero_at_first_stays_zero():
    weight = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])
    for p in (eqxreg.UnitNorm(axis="unit"), eqxreg.MaxNorm(1.5, axis="unit")):
        bound, _ = eqxreg.Relative(p).bind(weight)
        moved = weight.at[1].add(1.0)
        assert jnp.array_equal(bound(moved), weight)
        gradient = jit(jax.grad(lambda w: jnp.sum(bound(w) ** 3)))  # noqa: B023
        assert jnp.all(jnp.isfinite(gradient(moved)))


def test_a_weight_that_is_zero_at_first_has_no_norm_to_be_relative_to():
    p = eqxreg.Relative(eqxreg.UnitNorm())
    with pytest.raises(Exception, match="has no norm to be relative to"):
        eqxreg.project(p).init({"weight": jnp.zeros(3)})
