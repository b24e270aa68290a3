"""Keras 3, asked while the tests run: where eqxreg does what it does, and where, on
purpose, it does not.

Keras keeps the units of a dense or convolutional kernel last, Equinox first. So what is
`axis=0` or `axis=[0, 1, 2]` there is `axis="unit"` here.
"""

import functools as ft
import os
import pathlib
import pickle
import subprocess
import sys

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tables import assert_close, exact


# Keras is 1e-7 off by its formula, and eqxreg stays a little below its bounds.
close = ft.partial(np.testing.assert_allclose, rtol=3e-6, atol=1e-7)


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    """Asks Keras: `keras(function, *arguments)`, the function of `keras_numbers.py`."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        # Keras writes its defaults into its home.
        "KERAS_HOME": str(tmp_path_factory.mktemp("keras")),
        # Elsewhere, a product of matrices may be less than exact.
        "JAX_PLATFORMS": "cpu",
    }
    script = pathlib.Path(__file__).with_name("keras_numbers.py")
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, script], stdin=pipe, stdout=pipe, env=environment
    ) as process:

        def ask(*question):
            pickle.dump(question, process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)

        yield ask
        process.kill()


# Constraints

# The shape of a weight in Equinox, the order of its axes in Keras, and the `axis` that
# Keras needs for one norm a unit.
LAYOUTS = {
    "Dense": ((5, 6), (1, 0), 0),
    "Conv2D": ((5, 4, 3, 3), (2, 3, 1, 0), [0, 1, 2]),
    "Conv2DTranspose": ((5, 4, 3, 3), (2, 3, 0, 1), [0, 1, 3]),
    "Embedding": ((5, 6), (0, 1), 1),
}
SAME = {
    "max": ("MaxNorm", dict(max_value=2.0), eqxreg.MaxNorm(2.0, axis="unit")),
    "min_max": (
        "MinMaxNorm",
        dict(min_value=1.0, max_value=2.0),
        eqxreg.MinMaxNorm(1.0, 2.0, axis="unit"),
    ),
    "part of the way": (
        "MinMaxNorm",
        dict(min_value=1.0, max_value=2.0, rate=0.3),
        eqxreg.MinMaxNorm(1.0, 2.0, rate=0.3, axis="unit"),
    ),
    "unit": ("UnitNorm", {}, eqxreg.UnitNorm(axis="unit")),
    "non_negative": ("NonNeg", {}, eqxreg.NonNegative()),
}
*MAX_NORM, max_norm = SAME["max"]


def units(shape, first=0.5, last=3.0, dtype="float32"):
    """A weight in Equinox's layout. The norms of its units are evenly spaced."""
    directions = np.random.default_rng(0).standard_normal(
        (shape[0], np.prod(shape[1:]))
    )
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    norms = np.linspace(first, last, shape[0])[:, None]
    return (norms * directions).reshape(shape).astype(dtype)


def at(fn, weight):
    """The value of one of our functions, as one program."""
    return jax.jit(fn)(jnp.asarray(weight))


def norms_of(weight):
    return np.linalg.norm(exact(weight).reshape(len(weight), -1), axis=1)


@pytest.mark.parametrize("name", SAME)
def test_constraints_agree_to_rounding(name, keras):
    *theirs, ours = SAME[name]
    weight = units((5, 6))
    close(at(ours, weight), keras("constrain", *theirs, weight.T).T)


@pytest.mark.parametrize("layer", LAYOUTS)
def test_unit_is_the_axis_that_each_layer_of_keras_needs(layer, keras):
    shape, order, axis = LAYOUTS[layer]
    weight = units(shape)
    arguments = dict(max_value=2.0, axis=axis)
    theirs = keras("constrain", "MaxNorm", arguments, weight.transpose(order))
    close(at(max_norm, weight), theirs.transpose(np.argsort(order)))


def test_the_example_of_the_manual_is_projected():
    # "Base class for weight constraints" in Keras's API reference.
    assert eqxreg.NonNegative()(jnp.asarray([-1.0, 1.0])).tolist() == [0.0, 1.0]


def test_keras_changes_weights_that_are_inside_and_eqxreg_does_not(keras):
    inside = units((64, 32), last=1.9)
    theirs = keras("constrain", *MAX_NORM, inside.T).T
    assert np.any(theirs != inside)
    close(theirs, inside)
    assert np.array_equal(at(max_norm, inside), inside)


def test_keras_exceeds_the_bound_and_eqxreg_does_not(keras):
    outside = units((64, 32), first=2.5)
    theirs = keras("constrain", *MAX_NORM, outside.T).T
    assert f"{norms_of(theirs).max():.7f}" == "2.0000002"
    assert norms_of(at(max_norm, outside)).max() <= 2.0


def test_twice_is_not_once_in_keras_but_is_in_eqxreg(keras):
    weight = units((64, 32))
    once = keras("constrain", *MAX_NORM, weight.T)
    assert np.any(keras("constrain", *MAX_NORM, once) != once)
    once = at(max_norm, weight)
    assert np.array_equal(at(max_norm, once), once)


@pytest.mark.parametrize("name", ["max", "unit"])
def test_the_gradient_at_zero_is_nan_in_keras_and_the_identitys_here(name, keras):
    *theirs, ours = SAME[name]
    zero = np.zeros((5, 6), "float32")
    assert np.all(np.isnan(keras("constraint_gradient", *theirs, zero.T)))
    gradient = at(jax.grad(lambda w: jnp.sum(ours(w))), zero)
    assert np.array_equal(gradient, np.ones((5, 6)))


@pytest.mark.parametrize("size, dtype", [(1e25, "float32"), (6e4, "float16")])
def test_large_weights_vanish_in_keras_and_are_projected_here(size, dtype, keras):
    weight = np.full((5, 6), size, dtype)
    assert np.all(keras("constrain", *MAX_NORM, weight.T) == 0)
    np.testing.assert_allclose(norms_of(at(max_norm, weight)), 2.0, rtol=2e-3)


def test_small_weights_stay_small_in_keras_and_reach_the_sphere_here(keras):
    weight = units((5, 6), 1e-8, 1e-8)
    theirs = keras("constrain", "UnitNorm", {}, weight.T).T
    # 1e-8 / (1e-7 + 1e-8)
    np.testing.assert_allclose(norms_of(theirs), 1 / 11, rtol=1e-5)
    reached = at(eqxreg.UnitNorm(axis="unit"), weight)
    np.testing.assert_allclose(norms_of(reached), 1.0, rtol=1e-5)


def test_keras_takes_a_negative_bound_for_a_change_of_signs(keras):
    weight = units((5, 6))
    theirs = keras("constrain", "MaxNorm", {"max_value": -1.0}, weight.T).T
    close(theirs, -at(eqxreg.UnitNorm(axis="unit"), weight))
    with pytest.raises(ValueError, match="`max_norm` must be positive"):
        eqxreg.MaxNorm(-1.0)


def test_one_default_axis_is_wrong_for_kernels_that_unit_is_right_for(keras):
    shape, order, _ = LAYOUTS["Conv2D"]
    weight = 10 * units(shape)
    theirs = keras("constrain", *MAX_NORM, weight.transpose(order))
    assert norms_of(theirs.transpose(np.argsort(order))).max() > 4.0
    assert norms_of(at(max_norm, weight)).max() <= 2.0


# Penalties


def of_weight(fn, *args, **options):
    """A function of trees as one of an array, which goes by the name of a weight."""
    return lambda weight: fn({"weight": weight}, *args, **options)


orthogonality = of_weight(eqxreg.orthogonality_penalty, 1.0, mode="keras")
orthogonality_and_gradient = jax.jit(jax.value_and_grad(orthogonality))
PENALTIES = {
    "l1": ("L1", dict(l1=0.01), of_weight(eqxreg.l1_penalty, 0.01)),
    "l2": ("L2", dict(l2=0.01), of_weight(eqxreg.l2_penalty, 2 * 0.01)),
    "l1_l2": (
        "L1L2",
        dict(l1=0.01, l2=0.02),
        of_weight(eqxreg.elastic_net_penalty, 0.01, 2 * 0.02),
    ),
    "columns": (
        "OrthogonalRegularizer",
        dict(factor=1.0, mode="columns"),
        orthogonality,
    ),
    "rows": (
        "OrthogonalRegularizer",
        dict(factor=1.0, mode="rows"),
        lambda weight: orthogonality(weight.T),
    ),
}
COLUMNS = PENALTIES["columns"][:2]


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_and_their_gradients_agree(name, keras):
    *theirs, ours = PENALTIES[name]
    weight = units((5, 6))
    value, gradient = keras("penalise", *theirs, weight.T)
    actual, actual_gradient = at(jax.value_and_grad(ours), weight)
    close(actual, value)
    close(actual_gradient, gradient.T)


@pytest.mark.parametrize(
    "penalty, documented",
    [
        (of_weight(eqxreg.l1_penalty, 0.01), 0.25),
        (of_weight(eqxreg.l2_penalty, 2 * 0.5), 12.5),
        (of_weight(eqxreg.l2_penalty, 2 * 2.0), 50.0),
    ],
)
def test_the_numbers_of_the_manual(penalty, documented):
    # "Layer weight regularizers" in Keras's API reference, all of ones.
    np.testing.assert_allclose(at(penalty, jnp.ones((5, 5))), documented, rtol=1e-6)


def test_l2_has_no_half_in_keras(keras):
    weight = units((5, 6))
    value, _ = keras("penalise", *PENALTIES["l2"][:2], weight.T)
    half = at(of_weight(eqxreg.l2_penalty, 0.01), weight)
    np.testing.assert_allclose(value, 2 * half, rtol=1e-6)


def test_a_single_unit_is_orthogonal_here_and_nan_in_keras(keras):
    weight = units((1, 6))
    assert np.isnan(keras("penalise", *COLUMNS, weight.T)[0])
    value, gradient = orthogonality_and_gradient(weight)
    assert value == 0 and jnp.all(gradient == 0)


def test_a_zero_unit_has_a_finite_gradient_here_and_nan_in_keras(keras):
    weight = units((5, 6))
    weight[2] = 0
    value, gradient = keras("penalise", *COLUMNS, weight.T)
    assert np.all(np.isnan(gradient.T[2]))
    actual, actual_gradient = orthogonality_and_gradient(weight)
    close(actual, value)
    assert jnp.all(jnp.isfinite(actual_gradient))


def test_keras_refuses_the_kernel_of_a_convolution_and_eqxreg_flattens_it(keras):
    shape, order, _ = LAYOUTS["Conv2D"]
    weight = units(shape)
    refused = keras("refusal", *COLUMNS, weight.transpose(order))
    assert "must have rank 2" in refused
    flat = weight.reshape(len(weight), -1)
    value, _ = keras("penalise", *COLUMNS, flat.T)
    close(at(orthogonality, weight), value)


# Training

RATE, DECAY = 0.1, 0.3
descent = optax.scale_by_learning_rate(RATE)
TRAININGS = {
    # Subtracted before the step, from the weights that the gradient is of.
    "decay": (
        "SGD",
        dict(weight_decay=DECAY),
        None,
        optax.chain(eqxreg.weight_decay(DECAY), optax.sgd(RATE)),
    ),
    "decay and momentum": (
        "SGD",
        dict(weight_decay=DECAY, momentum=0.9),
        None,
        optax.chain(optax.trace(0.9), eqxreg.weight_decay(DECAY), descent),
    ),
    "AdamW": (
        "AdamW",
        dict(weight_decay=DECAY, epsilon=1e-12),
        None,
        optax.chain(
            optax.scale_by_adam(eps=1e-12), eqxreg.weight_decay(DECAY), descent
        ),
    ),
    **{
        name: (
            "SGD",
            {},
            SAME[name][:2],
            optax.chain(optax.sgd(RATE), eqxreg.project(SAME[name][2])),
        )
        for name in ("max", "part of the way")
    },
}
LINEAR = (units((5, 6)), np.linspace(-1, 1, 5, dtype="float32"))
DATA = (units((4, 6), 2.0), units((4, 5), 2.0))


def train_in_keras(keras, optimizer, arguments, constraint=None):
    weights = [LINEAR[0].T, LINEAR[1]]
    arguments = {"learning_rate": RATE, **arguments}
    history, final = keras("train", weights, DATA, optimizer, arguments, constraint)
    return [(kernel.T, bias) for kernel, bias in history], (final[0].T, final[1])


def linear(*arrays):
    """A layer of these arrays, without compiling the sampling of others."""
    build = ft.partial(eqx.nn.Linear, 6, 5, use_bias=len(arrays) > 1)
    layer = eqx.filter_eval_shape(build, key=jax.random.key(0))
    return jax.tree.structure(layer).unflatten(map(jnp.asarray, arrays))


def train_here(optimiser, steps=3):
    layer = linear(*LINEAR)
    x, y = map(jnp.asarray, DATA)

    def loss(layer):
        return jnp.mean((jax.vmap(layer)(x) - y) ** 2)

    @jax.jit
    def step(layer, state):
        gradient = jax.grad(loss)(layer)
        updates, state = optimiser.update(gradient, state, layer)
        return optax.apply_updates(layer, updates), state

    state, history = jax.jit(optimiser.init)(layer), []
    for _ in range(steps):
        layer, state = step(layer, state)
        history.append((layer.weight, layer.bias))
    return history


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", TRAININGS)
def test_training_agrees_step_by_step(name, keras):
    optimizer, arguments, constraint, optimiser = TRAININGS[name]
    theirs, _ = train_in_keras(keras, optimizer, arguments, constraint)
    for expected, actual in zip(theirs, train_here(optimiser), strict=True):
        assert_close(actual, expected)


def test_the_decay_of_keras_is_not_part_of_its_momentum(keras):
    theirs, _ = train_in_keras(keras, *TRAININGS["decay and momentum"][:2])
    coupled = optax.chain(eqxreg.weight_decay(DECAY), optax.sgd(RATE, momentum=0.9))
    here = train_here(coupled)
    close(here[0][0], theirs[0][0])
    assert np.abs(here[1][0] - theirs[1][0]).max() > 1e-2


def test_an_average_of_keras_violates_the_constraint_and_projected_here_does_not(keras):
    average = dict(use_ema=True, ema_momentum=0.9)
    history, final = train_in_keras(keras, "SGD", average, MAX_NORM)
    assert norms_of(history[-1][0]).max() < 2.0 + 1e-6
    # `fit` puts the average, which is of weights before they were constrained, into
    # the model when it ends.
    assert norms_of(final[0]).max() > 2.1
    projected = at(of_weight(eqxreg.project_params, max_norm), final[0])
    assert norms_of(projected["weight"]).max() <= 2.0


@pytest.mark.usefixtures("standard_promotion")
def test_keras_constrains_while_it_accumulates_gradients_and_eqxreg_waits(keras):
    accumulation = dict(gradient_accumulation_steps=2)
    [(kernel, bias), *_], _ = train_in_keras(keras, "SGD", accumulation, MAX_NORM)
    assert np.array_equal(bias, LINEAR[1])
    assert norms_of(kernel).max() < norms_of(LINEAR[0]).max() - 0.5
    optimiser = optax.chain(optax.sgd(RATE), eqxreg.project(max_norm))
    first, second = train_here(optax.MultiSteps(optimiser, 2), steps=2)
    assert np.array_equal(first[0], LINEAR[0])
    assert norms_of(second[0]).max() <= 2.0


def test_spectral_normalisation_overwrites_the_weight_in_keras_only(keras):
    # Of one large singular value, which a few iterations find.
    weight = units((5, 6)) + 10 * np.ones((5, 6), "float32")
    stored = keras("spectral_normalization", weight.T, 5).T
    wrapped = eqxreg.Constraint(linear(weight), "weight", eqxreg.SpectralNorm())
    assert np.array_equal(wrapped.weight, weight)
    baked = eqx.filter_jit(eqxreg.bake)(wrapped)
    np.testing.assert_allclose(baked.weight, stored, rtol=1e-5)
