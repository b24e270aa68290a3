"""States of optimisers: found for each parameter by Optax's `map_params`, cast, counted
to the end of the integers, pickled, and placed on devices."""

import pickle

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit
from tables import exact, sample


pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compilation")

MLP = eqx.nn.MLP(4, 2, 8, depth=1, key=jax.random.key(0))
PARAMS = eqx.filter(MLP, eqx.is_inexact_array)
UNIT = eqxreg.MaxNorm(0.3, axis="unit")
# How many arrays of the state are there, each for one parameter.
TRANSFORMS = {
    "project": (eqxreg.project(UNIT), 0),
    "chain": (eqxreg.project(eqxreg.Chain(eqxreg.NonNegative(), UNIT)), 0),
    "straight": (eqxreg.project(eqxreg.StraightThrough(UNIT), 2), 0),
    "tangent": (eqxreg.project(UNIT, 2, momentum="tangent"), 2),
    "cap": (eqxreg.project(eqxreg.SpectralCap(0.3)), 0),
    "scale-tangent": (
        eqxreg.project(eqxreg.SpectralScale(0.3), momentum="tangent"),
        2,
    ),
    "relative": (eqxreg.project(eqxreg.Relative(eqxreg.UnitNorm())), 0),
    "soft": (eqxreg.soft_threshold(0.1, learning_rate=0.1), 0),
    "group": (eqxreg.group_soft_threshold(0.1, learning_rate=0.1), 0),
    "elastic": (eqxreg.elastic_net_prox(0.1, 0.1, learning_rate=0.1), 0),
    "decay": (eqxreg.weight_decay(0.1), 0),
    "sign": (eqxreg.sign_decay(0.1), 0),
    "cautious": (eqxreg.cautious_weight_decay(0.1), 0),
    "corrected": (eqxreg.corrected_weight_decay(0.1, 0.1), 0),
    "independent": (eqxreg.independent_weight_decay(0.1, 0.1), 0),
    "towards": (eqxreg.decay_towards(MLP, 0.1), 4),
    "towards-weights": (eqxreg.decay_towards(MLP, 0.1, eqxreg.weights), 2),
}
WRAPS = {
    "alone": (lambda inner: inner, 0),
    "chain": (lambda inner: optax.chain(optax.adam(0.1), inner), 8),
    "accumulated": (lambda inner: optax.MultiSteps(inner, 2), 4),
    "masked": (lambda inner: optax.masked(inner, eqxreg.weights), 0),
    "finite": (lambda inner: optax.apply_if_finite(inner, 2), 0),
    "partitioned": (
        lambda inner: optax.partition(
            {True: inner, False: optax.set_to_zero()}, lambda tree: eqxreg.weights(tree)
        ),
        0,
    ),
    "injected": (
        lambda inner: optax.inject_hyperparams(
            lambda rate: optax.chain(optax.sgd(rate), inner)
        )(rate=0.1),
        0,
    ),
}
each_transform = pytest.mark.parametrize("name", list(TRANSFORMS))


def is_masked(node):
    return isinstance(node, optax.MaskedNode)


@each_transform
@pytest.mark.parametrize("wrap", list(WRAPS))
def test_map_params_finds_what_the_state_has_for_each_parameter(name, wrap):
    transform, own = TRANSFORMS[name]
    build, others = WRAPS[wrap]
    if own == 4 and wrap in ("masked", "partitioned"):
        own = 2  # Of the weights only.
    optimiser = build(transform)
    state = optimiser.init(PARAMS)
    names = jax.tree.map(lambda leaf: "a parameter", PARAMS)
    marked = optax.tree.map_params(
        optimiser,
        lambda leaf, name: None if is_masked(leaf) else name,
        state,
        names,
        is_leaf=is_masked,
    )
    assert jax.tree.leaves(marked).count("a parameter") == own + others
    cast = optax.tree.map_params(optimiser, lambda leaf: leaf.astype("bfloat16"), state)
    assert jax.tree.structure(cast) == jax.tree.structure(state)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(cast)]
    assert dtypes.count("bfloat16") == own + others


@each_transform
def test_a_state_may_be_cast_and_keeps_its_dtypes(name):
    transform, _ = TRANSFORMS[name]
    half = lambda leaf: leaf.astype("bfloat16") if eqx.is_inexact_array(leaf) else leaf
    state = transform.init(PARAMS)
    update = jit(transform.update)
    expected, _ = update(PARAMS, state, PARAMS)
    state = jax.tree.map(half, state)
    updates, after = update(PARAMS, state, PARAMS)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-2)


# Counting


def test_a_projection_still_comes_when_the_counter_is_at_its_end():
    projection = eqxreg.project(eqxreg.MaxNorm(1.0), every=10)
    params = {"weight": jnp.asarray([3.0, 4.0])}
    zeros = {"weight": jnp.zeros(2)}
    state = projection.init(params)
    # The largest integer is 7 more than a multiple of 10.
    last = 2**31 - 1
    state = state._replace(step=jnp.asarray(last - 12, jnp.int32))
    update, due = jit(projection.update), []
    for count in range(last - 11, last + 30):
        updates, state = update(zeros, state, params)
        if jnp.any(updates["weight"] != 0):
            due.append(count)
        assert last - 12 < state.step <= last
    assert due == [last - 7, last + 3, last + 13, last + 23]


def test_other_counters_stay_at_their_end_as_in_optax():
    params = {"weight": jnp.ones(2)}
    decay = eqxreg.weight_decay(0.1)
    state = decay.init(params)._replace(step=jnp.asarray(2**31 - 2, jnp.int32))
    for _ in range(3):
        _, state = decay.update(params, state, params)
        assert state.step == 2**31 - 1


# Pickles


PICKLED = {
    "project": eqxreg.project(UNIT, 2),
    "tangent": eqxreg.project(
        eqxreg.SpectralCap(0.5), 2, eqxreg.everything, momentum="tangent"
    ),
    "relative": eqxreg.project(eqxreg.Relative(eqxreg.UnitNorm())),
    "soft": eqxreg.soft_threshold(0.1, learning_rate=0.1),
    "group": eqxreg.group_soft_threshold(0.1, learning_rate=0.1),
    "elastic": eqxreg.elastic_net_prox(0.1, 0.1, learning_rate=0.1),
    "decay": eqxreg.weight_decay(jnp.asarray(0.1)),
    "sign": eqxreg.sign_decay(0.1),
    "cautious": eqxreg.cautious_weight_decay(0.1),
    "corrected": eqxreg.corrected_weight_decay(0.1, 0.1),
    "independent": eqxreg.independent_weight_decay(0.1, 0.1, 0.2),
    "towards": eqxreg.decay_towards({"weight": jnp.ones((3, 2))}, 0.1),
}


@pytest.mark.parametrize("name", list(PICKLED))
def test_a_transform_is_pickled(name):
    transform = PICKLED[name]
    again = pickle.loads(pickle.dumps(transform))
    params = {"weight": sample("float32", shape=(3, 2))}
    found = []
    for one in (transform, again):
        updates, state = one.update(params, one.init(params), params)
        state = pickle.loads(pickle.dumps(state))
        found.append(jit(one.update)(params, state, params))
    assert eqx.tree_equal(*found)


# Devices


def test_a_reference_is_put_where_the_parameter_is():
    first, second, *_ = jax.devices()
    put = lambda tree, device: jax.device_put(tree, device)
    params = put({"weight": jnp.asarray([2.0, 4.0])}, first)
    for reference in (
        put({"weight": jnp.ones(2)}, second),
        {"weight": np.ones(2, "float32")},
    ):
        decay = eqxreg.decay_towards(reference, 0.5)
        zeros = jax.tree.map(jnp.zeros_like, params)
        for init in (decay.init, jit(decay.init)):
            state = init(params)
            assert state.references["weight"].devices() == {first}
            updates, _ = jit(decay.update)(zeros, state, params)
            np.testing.assert_allclose(updates["weight"], [0.5, 1.5])
        assert not isinstance(reference["weight"], jax.Array) or (
            reference["weight"].devices() == {second}
        )


def test_a_reference_is_sharded_as_the_parameter_is():
    mesh = jax.make_mesh((8,), ("a",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
    weight = sample("float32", shape=(16, 4))
    params = {"weight": jax.device_put(weight, sharding)}
    decay = eqxreg.decay_towards({"weight": weight - 1}, 1.0)
    state = decay.init(params)
    assert state.references["weight"].sharding == sharding
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jit(decay.update)(zeros, state, params)
    np.testing.assert_allclose(exact(updates["weight"]), 1.0, rtol=1e-6)
