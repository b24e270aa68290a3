"""Weights and updates of different precisions: promises are those of the weights, in
the loops that people write."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit
from tables import exact, sample


pytestmark = pytest.mark.usefixtures("quick_compilation", "standard_promotion", "x64")

RATE, STEPS, SHAPE = 0.1, 20, (40, 30)


def trained(transform, dtypes, wrap=lambda inner: inner, apply=optax.apply_updates):
    """A weight after some steps of SGD with gradients of another dtype, and the
    updates that there were."""
    weight, update = dtypes
    optimiser = wrap(optax.chain(optax.sgd(RATE), transform))
    params, seen = {"weight": sample(weight, 0.3, SHAPE)}, []
    state, step = optimiser.init(params), jit(optimiser.update)
    for i in range(STEPS):
        grads = {"weight": sample(update, 1.0, SHAPE, seed=i + 1)}
        updates, state = step(grads, state, params)
        params = apply(params, updates)
        seen.append(updates["weight"].dtype)
    return params["weight"], seen


NARROW = [
    ("float32", "bfloat16"),
    ("float32", "float16"),
    ("float64", "float32"),
    ("float64", "bfloat16"),
    ("float16", "bfloat16"),
    ("complex128", "complex64"),
]
WIDE = [
    ("bfloat16", "float32"),
    ("float16", "float32"),
    ("float32", "float64"),
    ("float32", "float32"),
]
PAIRS = NARROW + WIDE
LOOPS = {
    "alone": {},
    "equinox": {"apply": eqx.apply_updates},
    "accumulated": {"wrap": lambda inner: optax.MultiSteps(inner, 2)},
}
# What is rounded when a weight of the dtype is stored.
EPS = {"float16": 1e-3, "bfloat16": 8e-3}


def _accumulates(weight: str, update: str) -> bool:
    """Whether Optax does: complex gradients it never does, and those of another half
    precision than the weight's not in 0.2.6."""
    is_old = optax.__version__ == "0.2.6"
    mixed = {weight, update} == {"float16", "bfloat16"}
    return not (weight.startswith("complex") or (mixed and is_old))


CASES = [
    (dtypes, loop)
    for dtypes in PAIRS
    for loop in LOOPS
    if loop != "accumulated" or _accumulates(*dtypes)
]
each_case = pytest.mark.parametrize("dtypes, loop", CASES, ids=str)


@each_case
def test_norms_are_within_the_bound_of_the_weights_precision(dtypes, loop):
    projection = eqxreg.project(eqxreg.MaxNorm(1.0, axis="unit"))
    weight, _ = trained(projection, dtypes, **LOOPS[loop])
    norms = np.sqrt((np.abs(exact(weight)) ** 2).sum(1))
    assert norms.max() <= 1 + EPS.get(dtypes[0], 1e-6)
    assert norms.max() > 0.98


@each_case
def test_no_entry_is_negative(dtypes, loop):
    if dtypes[0].startswith("complex"):
        pytest.skip("Complex numbers have no sign.")
    weight, _ = trained(eqxreg.project(eqxreg.NonNegative()), dtypes, **LOOPS[loop])
    assert exact(weight).min() >= 0 and (exact(weight) == 0).any()


@each_case
def test_zeros_are_exact(dtypes, loop):
    size = 7.0 if dtypes[0].startswith("complex") else 5.0
    for prox in (
        eqxreg.soft_threshold(2.0, learning_rate=RATE),
        eqxreg.elastic_net_prox(2.0, 0.1, learning_rate=RATE),
        eqxreg.group_soft_threshold(size, learning_rate=RATE),
    ):
        weight, _ = trained(prox, dtypes, **LOOPS[loop])
        assert 0.03 < (exact(weight) == 0).mean() < 1


@each_case
def test_an_update_has_its_dtype_or_the_wider_one_of_the_weight(dtypes, loop):
    expected = dtypes[0] if dtypes in NARROW else dtypes[1]
    for transform in (
        eqxreg.project(eqxreg.MaxNorm(1.0), every=3),
        eqxreg.project(eqxreg.SpectralScale(1.0), every=2, momentum="tangent"),
        eqxreg.soft_threshold(0.1, learning_rate=RATE),
        eqxreg.weight_decay(0.1),
    ):
        # Whether a projection is due or not.
        _, seen = trained(transform, dtypes, **LOOPS[loop])
        assert set(seen) == {jnp.dtype(expected)}


def test_projections_between_others_end_where_they_should():
    projection = eqxreg.project(eqxreg.MaxNorm(1.0), every=STEPS // 2)
    weight, _ = trained(projection, ("float32", "bfloat16"))
    assert 0.999 <= np.linalg.norm(exact(weight)) <= 1 + 1e-6


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("float64", "float32")])
def test_decay_is_not_lost_to_the_precision_of_the_gradient(dtypes):
    """As in Optax, whose decay is of the dtype of the sum."""
    weight = sample(dtypes[0], 1.0, SHAPE)
    grads = {"weight": sample(dtypes[1], 1e3, SHAPE, seed=1)}
    theirs, ours = optax.add_decayed_weights(1e-2), eqxreg.weight_decay(1e-2)
    found = []
    for decay in (theirs, ours):
        params = {"weight": weight}
        found.append(decay.update(grads, decay.init(params), params)[0]["weight"])
    assert found[0].dtype == found[1].dtype == dtypes[0]
    np.testing.assert_array_equal(*found)
    eps = jnp.finfo(dtypes[0]).eps
    right = exact(grads["weight"]) + 1e-2 * exact(weight)
    np.testing.assert_allclose(exact(found[1]), right, rtol=4 * eps)


@pytest.mark.parametrize("name", ["sign", "towards", "cautious", "independent"])
def test_other_decay_keeps_the_precision_of_the_weights_too(name):
    params = {"weight": sample("float32", 1.0, SHAPE)}
    reference = {"weight": jnp.zeros(SHAPE)}
    decay = {
        "sign": eqxreg.sign_decay(1e-3),
        "towards": eqxreg.decay_towards(reference, 1e-3),
        "cautious": eqxreg.cautious_weight_decay(1e-3),
        "independent": eqxreg.independent_weight_decay(1e-3, 1.0),
    }[name]
    w, grads = exact(params["weight"]), {"weight": jnp.ones(SHAPE, "bfloat16")}
    with jax.numpy_dtype_promotion("strict"):
        updates, _ = jit(decay.update)(grads, decay.init(params), params)
    away = {"sign": np.sign(w), "cautious": np.maximum(w, 0), "independent": -w}
    expected = 1 + 1e-3 * away.get(name, w)
    np.testing.assert_allclose(exact(updates["weight"]), expected, rtol=1e-6)
