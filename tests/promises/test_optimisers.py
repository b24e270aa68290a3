"""Every map and every wrapper under optimisers that know of neither, without masks: a
hundred steps, and then each weight is measured in double precision."""

import functools as ft
from collections.abc import Callable

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tables import PROJECTIONS, SHAPE, exact, sample


# Few optimisers are clean under strict promotion.
pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compilation")

OPTIMISERS: dict[str, Callable] = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "lion": lambda: optax.lion(1e-2, weight_decay=0.1),
    "lamb": lambda: optax.lamb(1e-2, weight_decay=0.1),
    "adafactor": lambda: optax.adafactor(1e-2, weight_decay_rate=1e-3),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2, weight_decay=0.1),
}


class Weighted(eqx.Module):
    """A weight, and a function of it whose gradient is as long as the weight is."""

    weight: jax.Array

    def __call__(self, target):
        return jnp.sum(jnp.sin(3 * self.weight + target))


def largest(weight):
    return np.linalg.svd(weight.reshape(len(weight), -1), compute_uv=False)[0]


def off_orthonormal(weight):
    matrix = weight.reshape(len(weight), -1)
    tall = matrix if len(matrix) >= matrix.shape[1] else matrix.T
    return np.abs(tall.T @ tall - np.eye(tall.shape[1])).max()


def ratio_to(first):
    """The largest of the norms of units, as shares of what they were at first."""
    norms = lambda w: np.sqrt((w**2).sum((1, 2)))
    return lambda weight: (norms(weight) / norms(exact(first))).max()


MASK = np.arange(np.prod(SHAPE)).reshape(SHAPE) % 2 == 0
START = sample("float32", 0.3)

# A map, what is measured of its weight, and what that is at least and at most.
Case = tuple[eqxreg.Parametrization, Callable, float, float]
CASES: dict[str, Case] = {
    # By rounding, and by estimates of singular values, a bound may be met only nearly.
    **{
        case.name: (
            case.map,
            case.measure,
            -np.inf if case.low is None else case.low - abs(case.low) * 2e-5,
            case.high + abs(case.high) * (1e-4 if "spectral" in case.name else 1e-7),
        )
        for case in PROJECTIONS
    },
    "traced": (
        eqxreg.MaxNorm(jnp.asarray(0.7), axis="unit"),
        lambda w: np.sqrt((w**2).sum((1, 2))),
        0.0,
        float(np.float32(0.7)),
    ),
    "relative": (
        eqxreg.Relative(eqxreg.MaxNorm(1.1, axis="unit")),
        ratio_to(START),
        0.0,
        1.1 * (1 + 1e-6),
    ),
    "orthogonal": (eqxreg.Orthogonal(), off_orthonormal, 0.0, 5e-6),
    "cayley": (eqxreg.Cayley(), off_orthonormal, 0.0, 5e-6),
    "matrix_exp": (eqxreg.MatrixExp(), off_orthonormal, 0.0, 5e-6),
    "almost_orthogonal": (eqxreg.AlmostOrthogonal(), largest, 0.0, 1 + 1e-6),
    "masked": (eqxreg.Masked(~MASK), lambda w: np.abs(w[MASK]), 0.0, 0.0),
    "low_rank": (
        eqxreg.LowRank(2),
        lambda w: np.linalg.svd(w.reshape(len(w), -1), compute_uv=False)[2],
        0.0,
        2e-6,
    ),
    "interval": (eqxreg.Interval(-2.0, 2.0), np.abs, 0.0, 2.0),
    "positive": (
        eqxreg.Chain(eqxreg.Interval(-2.0, 2.0), eqxreg.Box(-1.0, 1.0)),
        np.abs,
        0.0,
        1.0,
    ),
}
NAMED: dict[str, tuple[Callable, str]] = {
    "MaxNormConstraint": (
        lambda m: eqxreg.MaxNormConstraint(m, "weight", 0.7, axis="unit"),
        "max_norm-unit-2",
    ),
    "UnitNormConstraint": (
        lambda m: eqxreg.UnitNormConstraint(m, "weight", 0.7),
        "unit_norm-whole",
    ),
    "MinMaxNormConstraint": (
        lambda m: eqxreg.MinMaxNormConstraint(m, "weight", 0.3, 0.7, axis="unit"),
        "min_max",
    ),
    "NonNegativeConstraint": (
        lambda m: eqxreg.NonNegativeConstraint(m, "weight"),
        "non_negative",
    ),
    "BoxConstraint": (
        lambda m: eqxreg.BoxConstraint(m, "weight", -0.3, 0.7),
        "box",
    ),
    "SpectralCapConstraint": (
        lambda m: eqxreg.SpectralCapConstraint(m, cap=0.7),
        "spectral_cap",
    ),
    "OrthogonalConstraint": (lambda m: eqxreg.OrthogonalConstraint(m), "orthogonal"),
}


@ft.cache
def wrapped():
    """A wrapped layer for each map and each named wrapper."""
    maps = {name: p for name, (p, *_) in CASES.items()}
    layer = Weighted(START)
    return {
        **{name: eqxreg.Constraint(layer, "weight", p) for name, p in maps.items()},
        **{name: wrap(layer) for name, (wrap, _) in NAMED.items()},
    }


TARGETS = sample("float32", seed=1)


@ft.cache
def gradient():
    """Compiled once: all optimisers see the same trees."""
    _, static = eqx.partition(wrapped(), eqx.is_inexact_array)

    def loss(params):
        model = eqx.combine(params, static)
        return sum(layer(TARGETS) for layer in model.values())

    return jax.jit(jax.grad(loss))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_set_holds_after_a_hundred_steps(name, dtype):
    params, static = eqx.partition(wrapped(), eqx.is_inexact_array)
    optimiser = OPTIMISERS[name]()
    state = optimiser.init(params)

    @jax.jit
    def update(grads, state, params):
        grads = jax.tree.map(lambda g: g.astype(dtype), grads)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(100):
        params, state = update(gradient()(params), state, params)
    if name == "schedule_free":
        params = optax.contrib.schedule_free_eval_params(state, params)
    bake = jax.jit(lambda params: eqxreg.bake(eqx.combine(params, static)))
    first = bake(eqx.filter(wrapped(), eqx.is_inexact_array))
    moved = 0
    for case, layer in bake(params).items():
        _, measure, low, high = CASES[NAMED[case][1] if case in NAMED else case]
        weight = exact(layer.weight)
        assert np.all(np.isfinite(weight)), case
        measured = measure(weight)
        assert np.all(measured >= low) and np.all(measured <= high), case
        moved += not np.array_equal(weight, exact(first[case].weight))
    # It was trained, so that each of these might have left its set.
    assert moved == len(wrapped())


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_stateful_wrapper_holds_after_a_hundred_steps(name, key):
    build = eqx.nn.make_with_state(eqxreg.SpectralNormConstraint)
    linear = eqx.nn.Linear(8, 6, key=key)
    model, memory = build(linear, "weight", jnp.asarray(0.7), key=key)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimiser = OPTIMISERS[name]()
    state = optimiser.init(params)
    x = jnp.linspace(-1.0, 1.0, 8)

    @jax.jit
    def step(params, memory, state):
        def loss(params):
            out, new = eqx.combine(params, static)(x, memory)
            return jnp.sum(jnp.sin(3 * out)), new

        grads, memory = jax.grad(loss, has_aux=True)(params)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), memory, state

    for _ in range(100):
        params, memory, state = step(params, memory, state)
    trained = eqx.combine(params, static)
    # A call in training looks at the weight as it is now.
    _, memory = trained(x, memory)
    weight = exact(eqxreg.bake(trained, memory).weight)
    assert not np.allclose(weight, exact(linear.weight), atol=1e-2)
    np.testing.assert_allclose(largest(weight), 0.7, rtol=1e-3)
