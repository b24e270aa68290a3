"""Spectral maps in the optimiser: bounds in training, the vectors that the state keeps
to start from, stacks, and weights that are sharded."""

import math
import re

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from quick import jit
from spectra import MAPS, singular_values
from tables import assert_close, exact, sample


pytestmark = pytest.mark.usefixtures("quick_compilation")


def final_weights(optimiser, steps=30, learning_rate_scale=1.0):
    """Largest singular values of two layers after each step of noisy training."""
    params = {
        "weight": sample("float32", 0.3, (12, 8)),
        "second": {"weight": sample("float32", 0.3, (8, 12), seed=1)},
    }
    state = optimiser.init(params)

    @jit
    def step(params, state, key):
        keys = jax.random.split(key)
        grads = {
            "weight": jax.random.normal(keys[0], (12, 8)),
            "second": {"weight": jax.random.normal(keys[1], (8, 12))},
        }
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    values = []
    for i in range(steps):
        params, state = step(params, state, jax.random.key(i))
        values.append([singular_values(w)[0] for w in jax.tree.leaves(params)])
    return np.asarray(values), state


OPTIMISERS = {"adam": lambda: optax.adam(0.1), "muon": lambda: optax.contrib.muon(0.1)}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", list(OPTIMISERS))
@pytest.mark.parametrize(
    "p, slack", [(eqxreg.SpectralCap(0.7), 1e-6), (eqxreg.SpectralScale(0.7), 1e-3)]
)
def test_projection_after_the_update_bounds_the_spectrum(p, slack, name):
    chain = optax.chain(OPTIMISERS[name](), eqxreg.project(p, every=3))
    values, state = final_weights(chain)
    assert np.all(values[2::3] <= 0.7 * (1 + slack))
    # In between it is training that decides: the constraint is what keeps it small.
    assert np.any(values[3::3] > 0.71)
    carried = state[-1].carried
    assert [s.shape for s in jax.tree.leaves(carried)] == [(1, 12), (1, 8)]


@pytest.mark.usefixtures("standard_promotion")
def test_the_optimiser_keeps_the_vectors_to_start_from():
    p = eqxreg.Chain(eqxreg.SpectralScale(0.7), eqxreg.MaxNorm(3.0))
    weight = sample("float32", shape=(12, 8))
    transform = eqxreg.project(p)
    state = transform.init({"weight": weight})
    _, _, vh = np.linalg.svd(exact(weight))
    [start] = jax.tree.leaves(state.carried)
    assert abs(exact(start)[0] @ vh[0]) == pytest.approx(1.0, abs=1e-4)
    other = sample("float32", shape=(12, 8), seed=7)
    update = jit(transform.update)
    for _ in range(5):
        updates, state = update({"weight": other - weight}, state, {"weight": weight})
    _, _, vh = np.linalg.svd(exact(other))
    [start] = jax.tree.leaves(state.carried)
    assert abs(exact(start)[0] @ vh[0]) == pytest.approx(1.0, abs=1e-4)


def test_a_cap_that_is_well_inside_is_seen_without_a_factorisation():
    transform = eqxreg.project(eqxreg.SpectralCap(0.7))
    params = {"weight": jnp.zeros((64, 48))}
    state = transform.init(params)
    text = jit(transform.update).lower(params, state, params).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert "conditional" in entry
    assert "syevd" not in entry and "syevd" in text


@pytest.mark.usefixtures("standard_promotion")
def test_seeds_under_vmap_are_a_loop():
    p = eqxreg.SpectralScale(0.7)
    transform = eqxreg.project(p, every=2)
    weights = jnp.stack([sample("float32", shape=(6, 4), seed=i) for i in range(3)])
    params, zero = {"weight": weights}, {"weight": jnp.zeros_like(weights)}
    states = jax.vmap(transform.init)(params)
    for _ in range(2):
        updates, states = jit(jax.vmap(transform.update))(zero, states, params)
    result = weights + updates["weight"]
    alone = jit(lambda weight: p(weight))
    expected = jnp.stack([alone(weight) for weight in weights])
    assert_close(list(result), list(expected))


def test_a_stack_of_layers_is_projected_one_by_one():
    layers = eqx.filter_vmap(lambda k: eqx.nn.Linear(4, 6, key=k))(
        jax.random.split(jax.random.key(0), 3)
    )
    params = eqx.filter(layers, eqx.is_inexact_array)
    transform = eqxreg.project(eqxreg.SpectralNorm(0.5))
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jit(transform.update)(zero, transform.init(params), params)
    weights = optax.apply_updates(params, updates).weight
    tops = [singular_values(weight)[0] for weight in weights]
    np.testing.assert_allclose(tops, 0.5, rtol=1e-5)


@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
@pytest.mark.parametrize("spec", [("a", None), ("a", "b")], ids=str)
def test_warm_starts_of_a_sharded_weight_gather_nothing(spec, axes):
    types = (getattr(AxisType, axes),) * 2
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=types)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    transform = eqxreg.project(eqxreg.SpectralScale(0.7))
    weight = sample("float32", shape=(64, 32))
    params = {"weight": jax.device_put(weight, sharding)}
    state = transform.init(params)
    zero = jax.tree.map(jnp.zeros_like, params)
    compiled = jit(transform.update).lower(zero, state, params).compile()
    text = compiled.as_text()
    assert "all-to-all" not in text
    # With explicit axes the vectors to start from are kept whole; no weight is.
    gathered = re.findall(r"= f32\[([\d,]*)\]\S* all-gather", text)
    assert all(math.prod(map(int, dims.split(","))) <= 64 for dims in gathered)
    updates, _ = compiled(zero, state, params)
    result = np.asarray(updates["weight"]) + np.asarray(weight)
    expected = jit(eqxreg.SpectralScale(0.7))(weight)
    assert_close(result, expected)


@pytest.mark.parametrize("name", ["cap", "orthogonal", "almost", "cayley"])
def test_maps_of_matrices_keep_the_layout_of_a_sharded_weight(name):
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    sharding = NamedSharding(mesh, PartitionSpec("a", "b"))
    weight = sample("float32", 0.1, shape=(64, 32))
    total = lambda weight: jnp.sum(MAPS[name](weight) ** 3)
    gradient = jit(jax.grad(total))(jax.device_put(weight, sharding))
    assert gradient.sharding.spec == sharding.spec
    expected = jit(jax.grad(total))(weight)
    assert_close(gradient, expected)
