"""Optimisers.jl and Flux: the numbers in their manuals, docstrings and tests. There is
no Julia here, so they are written down, each with its page."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tables import assert_close


def update(optimiser, params, *gradients):
    """The parameters after one update for each of the gradients."""
    state = optimiser.init(params)
    for gradient in gradients:
        updates, state = optimiser.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


# Decay

# test/runtests.jl, "OptimiserChain", where the step is the gradient itself.
CHAINS = {
    "WeightDecay(0.1)": ([eqxreg.weight_decay(0.1)], [-0.1, 7.0, 87.0]),
    "SignDecay(0.1)": ([eqxreg.sign_decay(0.1)], [-0.1, 7.9, 96.9]),
    "ClipGrad(2), WeightDecay(0.1)": (
        [optax.clip(2.0), eqxreg.weight_decay(0.1)],
        [-0.1, 7.0, 88.0],
    ),
    # By the rules, in the other order, the decay is clipped too.
    "WeightDecay(0.1), ClipGrad(2)": (
        [eqxreg.weight_decay(0.1), optax.clip(2.0)],
        [-0.1, 8.0, 98.0],
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_with_decay(name):
    chain, expected = CHAINS[name]
    x, dx = jnp.asarray([1.0, 10.0, 100.0]), jnp.asarray([1.0, 2.0, 3.0])
    actual = update(optax.chain(*chain, optax.sgd(1.0)), x, dx)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_decay_with_accumulated_gradients():
    # The docstring of `AccumGrad`: `OptimiserChain(AccumGrad(2), WeightDecay(0.01),
    # Descent(0.1))`.
    chain = optax.chain(eqxreg.weight_decay(0.01), optax.sgd(0.1))
    accumulated = optax.MultiSteps(chain, 2).gradient_transformation()
    params = {"x": jnp.asarray(1.0), "y": jnp.asarray(2.0)}
    first = {"x": jnp.asarray(33.0), "y": jnp.asarray(0.0)}
    second = {"x": jnp.asarray(0.0), "y": jnp.asarray(444.0)}
    assert update(accumulated, params, first) == params
    after = update(accumulated, params, first, second)
    assert after["x"] == pytest.approx(-0.651, rel=1e-6)
    assert after["y"] == pytest.approx(-20.202002, rel=1e-6)


def test_both_decays_are_a_penalty_of_both_norms():
    # The docstring of `SignDecay`: `OptimiserChain(SignDecay(0.012),
    # WeightDecay(0.034), ...)` is `0.012 * norm(x, 1) + 0.017 * norm(x, 2)^2`.
    x = np.array([3.0, -4.0, 12.0], "float32")
    penalty, gradient = jax.value_and_grad(
        lambda x: eqxreg.elastic_net_penalty(x, 0.012, 0.034)
    )(jnp.asarray(x))
    np.testing.assert_allclose(penalty, 0.012 * 19 + 0.017 * 13**2, rtol=1e-6)
    both = optax.chain(eqxreg.sign_decay(0.012), eqxreg.weight_decay(0.034))
    updates, _ = both.update(jnp.zeros(3), both.init(jnp.asarray(x)), jnp.asarray(x))
    np.testing.assert_allclose(updates, gradient, rtol=1e-6)


# The docstring of `AdamW`. The first update of Adam is the sign of the gradient.
ADAMW = {
    "x - η * (dx + λ * x)": (
        [eqxreg.weight_decay(0.2), optax.scale_by_learning_rate(0.1)],
        lambda x, dx: x - 0.1 * (dx + 0.2 * x),
    ),
    # `couple=false`
    "x - η * dx - λ * x": (
        [
            optax.scale_by_learning_rate(0.1),
            eqxreg.independent_weight_decay(0.2, learning_rate=0.1),
        ],
        lambda x, dx: x - 0.1 * dx - 0.2 * x,
    ),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", ADAMW)
def test_adamw_couples_its_decay_to_the_learning_rate_or_not(name):
    chain, formula = ADAMW[name]
    x, dx = np.array([1.0, 10.0, 100.0]), np.array([1.0, -2.0, 3.0])
    single = [jnp.asarray(a, "float32") for a in (x, dx)]
    actual = update(optax.chain(optax.scale_by_adam(), *chain), *single)
    np.testing.assert_allclose(actual, formula(x, np.sign(dx)), rtol=1e-5)


# Flux's guide to training, "Regularisation".
PENALTIES = {
    "L2": (lambda p: jnp.sum(p**2) / 2, eqxreg.weight_decay),
    "L1": (lambda p: jnp.sum(jnp.abs(p)), eqxreg.sign_decay),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", PENALTIES)
def test_decay_before_adam_is_the_penalty_summed_over_trainables(name, key):
    penalty, decay = PENALTIES[name]
    model = eqx.nn.MLP(3, 2, 4, depth=1, key=key)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params):
        return jnp.sum(eqx.combine(params, static)(jnp.linspace(-1.0, 1.0, 3)) ** 2)

    def penalised(params):
        return loss(params) + 0.42 * sum(map(penalty, eqxreg.trainables(params)))

    @jax.jit
    def trained(params):
        optimisers = optax.chain(decay(0.42), optax.adam(0.1)), optax.adam(0.1)
        results = []
        for optimiser, fn in zip(optimisers, (loss, penalised), strict=True):
            after, state = params, optimiser.init(params)
            for _ in range(2):
                updates, state = optimiser.update(jax.grad(fn)(after), state, after)
                after = optax.apply_updates(after, updates)
            results.append(after)
        return results

    assert_close(*trained(params))


# Trainables


def sum_of_squares(model):
    """The manual's `sum([sum(abs2, p) for p in trainables(model)])`."""
    return sum(jnp.sum(jnp.abs(p) ** 2) for p in eqxreg.trainables(model))


ONE, FOUR = jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([4.0, 5.0, 6.0])
MATRIX = jnp.asarray([[4.0, 6.0], [5.0, 7.0]])

# test/trainables.jl: trees, of which some hold an array twice, and the trainables. The
# gradients there are `[2.0, 4.0, 6.0]` wherever the first array stands, and so on.
TREES = {
    "m1": (ONE, [ONE]),
    "m2": ((ONE, FOUR), [ONE, FOUR]),
    "m3": ({"x": ONE, "y": jnp.sin, "z": FOUR}, [ONE, FOUR]),
    "m4": ({"x": ONE, "y": ONE, "z": FOUR}, [ONE, FOUR]),
    "m9": ({"a": ONE, "b": MATRIX, "c": [MATRIX, ONE]}, [ONE, MATRIX]),
}


@pytest.mark.parametrize("name", TREES)
def test_trainables_lists_arrays_in_order_and_tied_ones_once(name):
    tree, expected = TREES[name]
    listed = eqxreg.trainables(tree)
    assert len(listed) == len(expected)
    assert all(a is b for a, b in zip(listed, expected, strict=True))


@pytest.mark.parametrize("name", TREES)
def test_the_gradient_of_the_sum_is_twice_each_array_wherever_it_stands(name):
    tree, _ = TREES[name]
    gradient = eqx.filter_grad(sum_of_squares)(tree)
    doubled = jax.tree.map(lambda x: 2 * x, eqx.filter(tree, eqx.is_array))
    assert eqx.tree_equal(gradient, doubled)


def test_arrays_held_twice_are_one_in_julia_and_two_to_a_transformation_of_jax():
    tree, _ = TREES["m4"]
    once, twice = 14.0 + 77.0, 14.0 + 14.0 + 77.0
    assert sum_of_squares(tree) == once
    assert jax.value_and_grad(sum_of_squares)(tree)[0] == twice


class Tied(eqx.Module):
    """What says to JAX that two weights are one."""

    layers: eqx.nn.Shared

    def __init__(self, weight):
        keys = jax.random.split(jax.random.key(0))
        both = [eqx.nn.Linear(2, 2, use_bias=False, key=key) for key in keys]
        both[0] = eqx.tree_at(lambda layer: layer.weight, both[0], weight)
        get = lambda pair: pair[0].weight
        self.layers = eqx.nn.Shared(both, lambda pair: pair[1].weight, get)


def test_shared_layers_count_once_in_the_sum_and_in_its_gradient():
    value, gradient = eqx.filter_value_and_grad(sum_of_squares)(Tied(MATRIX))
    assert value == 4**2 + 6**2 + 5**2 + 7**2
    [gradient] = eqxreg.trainables(gradient)
    assert jnp.array_equal(gradient, 2 * MATRIX)


def test_second_derivatives_of_the_sum_over_trainables():
    # test/trainables.jl, "second order derivatives".
    model = {"w": jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), "b": jnp.zeros(2)}
    gradient = jax.grad(lambda m: sum_of_squares(jax.grad(sum_of_squares)(m)))(model)
    assert jnp.array_equal(gradient["w"], jnp.asarray([[8.0, 16.0], [24.0, 32.0]]))
    assert jnp.array_equal(gradient["b"], jnp.zeros(2))


def test_complex_gradients_are_conjugate_to_those_of_julia():
    # test/trainables.jl, "gradient", m6: Zygote's is 8 + 2im at 4 + im, JAX's is not.
    gradient = jax.grad(sum_of_squares)(jnp.asarray([4.0 + 1.0j]))
    assert gradient[0] == 8.0 - 2.0j
    decay = eqxreg.weight_decay(2.0)
    weight = jnp.asarray([4.0 + 1.0j])
    updates, _ = decay.update(jnp.zeros_like(weight), decay.init(weight), weight)
    assert updates[0] == 8.0 + 2.0j


def test_paths_of_trainables():
    # The docstring of `trainables`, where numbers that are no arrays do not count.
    x = {
        "a": jnp.asarray([1.0, 2.0]),
        "b": ({"c": jnp.asarray([3.0, 4.0]), "d": 5.0}, jnp.asarray([6.0, 7.0])),
    }
    listed = {path: y.tolist() for path, y in eqxreg.trainables(x, paths=True)}
    assert listed == {
        "['a']": [1.0, 2.0],
        "['b'][0]['c']": [3.0, 4.0],
        "['b'][1]": [6.0, 7.0],
    }


def test_scales_and_shifts_are_trainables_and_running_statistics_are_not(key):
    # The manual, "Collecting all trainable parameters": a 6-element vector.
    keys = jax.random.split(key)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Linear(2, 3, key=keys[0]),
            eqx.nn.Lambda(jnp.tanh),
            eqx.nn.BatchNorm(3, "batch", mode="ema"),
            eqx.nn.Linear(3, 2, key=keys[1]),
        ]
    )
    shapes = [array.shape for array in eqxreg.trainables(model)]
    assert shapes == [(3, 2), (3,), (3,), (3,), (2, 3), (2,)]


def test_frozen_layers_stay_and_their_momentum_does_too(key):
    # The manual, "Frozen Parameters", where the momentum stays zero. Here is none.
    keys = jax.random.split(key)
    model = eqx.nn.Sequential([eqx.nn.Linear(2, 2, key=key) for key in keys])
    last = eqxreg.select(
        names=("weight", "bias"), where=lambda path, layer, array: "[1]" in path
    )
    params, static = eqx.partition(eqxreg.freeze(model, last), eqx.is_inexact_array)
    optimiser = optax.sgd(0.1, momentum=0.9)
    shapes = [leaf.shape for leaf in jax.tree.leaves(optimiser.init(params))]
    assert shapes == [(2, 2), (2,)]
    params = update(optimiser, params, *[jax.tree.map(jnp.ones_like, params)] * 2)
    after = eqxreg.thaw(eqx.combine(params, static))
    assert eqx.tree_equal(after.layers[1], model.layers[1])
    assert not jnp.any(after.layers[0].weight == model.layers[0].weight)
