"""Decay that is more than weight decay: where it goes, when, and of which weights."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tables import exact


pytestmark = pytest.mark.usefixtures("quick_compilation")


W = {"weight": jnp.asarray([2.0, -4.0, 0.0]), "bias": jnp.asarray([1.0])}
ZEROS = jax.tree.map(jnp.zeros_like, W)
LINEAR = optax.linear_schedule(0.2, 0.0, 4)
"""0.2, 0.15, 0.1, 0.05, 0, ..."""


def updates_of(transform, params=W, updates=ZEROS, steps=1):
    """What each of some updates becomes."""
    state, seen = transform.init(params), []
    for _ in range(steps):
        new, state = transform.update(updates, state, params)
        seen.append(new)
    return seen


def close(a, b, **kwargs):
    np.testing.assert_allclose(a, b, rtol=1e-5, **kwargs)


def test_weights_are_drawn_to_the_reference():
    reference = {"weight": jnp.asarray([1.0, -5.0, 2.0]), "bias": jnp.asarray([1.0])}
    [new] = updates_of(eqxreg.decay_towards(reference, 0.5))
    close(new["weight"], [0.5, 0.5, -1.0])
    close(new["bias"], [0.0])


def test_a_reference_may_be_a_model(key):
    model = eqx.nn.MLP(4, 2, 8, depth=1, key=key)
    params = eqx.filter(model, eqx.is_inexact_array)
    optimiser = optax.chain(
        eqxreg.decay_towards(model, 1.0, mask=eqxreg.weights), optax.sgd(0.5)
    )
    doubled = jax.tree.map(lambda w: 2 * w, params)
    state = optimiser.init(doubled)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimiser.update(zeros, state, doubled)
    new = optax.apply_updates(doubled, updates)
    close(new.layers[0].weight, 1.5 * params.layers[0].weight)
    close(new.layers[0].bias, 2 * params.layers[0].bias)


def test_a_reference_that_does_not_fit_is_an_error():
    decay = eqxreg.decay_towards({**W, "weight": jnp.zeros(2)}, 0.5)
    with pytest.raises(ValueError, match=r"one of shape \(2,\)"):
        decay.init(W)
    decay = eqxreg.decay_towards({"other": jnp.zeros(3)}, 0.5, mask=eqxreg.weights)
    with pytest.raises(ValueError, match=r"at `\['weight'\]`.*has none"):
        decay.init(W)


def test_cautious_decay_acts_where_signs_agree():
    updates = {"weight": jnp.asarray([-1.0, -1.0, 5.0]), "bias": jnp.asarray([0.0])}
    [new] = updates_of(eqxreg.cautious_weight_decay(0.5), updates=updates)
    close(new["weight"], [-1.0, -3.0, 5.0])
    # A zero agrees with both.
    close(new["bias"], [0.5])


def test_cautious_decay_of_complex_weights_goes_by_whether_they_shrink():
    params = {"weight": jnp.asarray([1 + 1j, 1 + 1j], jnp.complex64)}
    updates = {"weight": jnp.asarray([1 - 0.5j, 0.5 - 1j], jnp.complex64)}
    [new] = updates_of(eqxreg.cautious_weight_decay(0.5), params, updates)
    close(new["weight"], [1.5 + 0j, 0.5 - 1j])


def test_corrected_decay_is_the_formula_of_adamc():
    peak, rate = 0.2, 0.3
    optimiser = optax.chain(
        eqxreg.corrected_weight_decay(rate, LINEAR, peak, mask=eqxreg.weights),
        optax.scale_by_learning_rate(LINEAR),
    )
    for step, new in enumerate(updates_of(optimiser, steps=4)):
        now = 0.2 - 0.05 * step
        close(new["weight"], -(now**2) / peak * rate * W["weight"], atol=1e-9)
        assert new["bias"] == 0


def test_independent_decay_follows_the_schedule_and_not_its_peak():
    for peak in (0.2, 20.0):
        schedule = lambda step, peak=peak: LINEAR(step) / 0.2 * peak
        decay = eqxreg.independent_weight_decay(0.3, schedule, peak)
        for step, new in enumerate(updates_of(decay, steps=5)):
            share = 1 - step / 4
            close(new["weight"], -0.3 * share * W["weight"], atol=1e-7)


def test_a_constant_learning_rate_is_its_own_peak():
    [new] = updates_of(eqxreg.independent_weight_decay(0.3, jnp.asarray(1e-3)))
    close(new["weight"], -0.3 * W["weight"])
    [new] = updates_of(eqxreg.independent_weight_decay(0.3, 0.1, 0.2))
    close(new["weight"], -0.15 * W["weight"])
    [new] = updates_of(eqxreg.corrected_weight_decay(0.3, 1e-3))
    close(new["weight"], 0.3 * W["weight"])


EVERY = {
    "weight": eqxreg.weight_decay,
    "sign": eqxreg.sign_decay,
    "towards": lambda rate, mask=None: eqxreg.decay_towards(ZEROS, rate, mask),
    "cautious": eqxreg.cautious_weight_decay,
    "corrected": lambda rate, mask=None: eqxreg.corrected_weight_decay(
        rate, 0.1, mask=mask
    ),
    "independent": lambda rate, mask=None: eqxreg.independent_weight_decay(
        rate, 0.1, mask=mask
    ),
}
every_decay = pytest.mark.parametrize("name", list(EVERY))


@every_decay
def test_a_rate_may_be_a_schedule_and_a_mask_a_selector(name):
    decay = EVERY[name](optax.constant_schedule(0.0), eqxreg.biases)
    [new] = updates_of(decay)
    assert jnp.all(new["weight"] == 0) and new["bias"] == 0
    decay = EVERY[name](optax.linear_schedule(0.0, 1.0, 2), eqxreg.weights)
    first, second = updates_of(decay, steps=2)
    assert jnp.all(first["weight"] == 0)
    assert jnp.any(second["weight"] != 0) and second["bias"] == 0


@every_decay
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_not_promoted(name, dtype):
    cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    decay = EVERY[name](0.5)
    if name == "towards":
        decay = eqxreg.decay_towards(cast(ZEROS), 0.5)
    [new] = updates_of(decay, cast(W), cast(ZEROS))
    assert new["weight"].dtype == dtype
    expected = {"sign": [0.5, -0.5, 0.0], "independent": [-1.0, 2.0, 0.0]}
    assert jnp.array_equal(
        new["weight"], jnp.asarray(expected.get(name, [1.0, -2.0, 0.0]), dtype)
    )


@every_decay
def test_parameters_are_asked_for(name):
    decay = EVERY[name](0.5)
    with pytest.raises(ValueError, match="needs the parameters"):
        decay.update(ZEROS, decay.init(W))


# Decay under wrappers


WRAPPERS = {
    "unit_norm": lambda layer: eqxreg.UnitNormConstraint(layer, "weight"),
    "spectral_norm": lambda layer: eqxreg.Constraint(
        layer, "weight", eqxreg.SpectralNorm()
    ),
    "orthogonal": lambda layer: eqxreg.OrthogonalConstraint(layer),
    "weight_norm": lambda layer: eqxreg.WeightNormConstraint(layer),
    "almost_orthogonal": lambda layer: eqxreg.Constraint(
        layer, "weight", eqxreg.AlmostOrthogonal()
    ),
    "clipped_then_normalised": lambda layer: eqxreg.Constraint(
        layer, "weight", eqxreg.Chain(eqxreg.NonNegative(), eqxreg.UnitNorm())
    ),
    "nested": lambda layer: eqxreg.MaxNormConstraint(
        eqxreg.UnitNormConstraint(layer, "weight"), "weight", 0.5
    ),
    "eqx.nn.WeightNorm": lambda layer: eqx.nn.WeightNorm(layer),
    "plain": lambda layer: layer,
    "max_norm": lambda layer: eqxreg.MaxNormConstraint(layer, "weight", 0.5),
    "non_negative": lambda layer: eqxreg.NonNegativeConstraint(layer, "weight"),
    "max_norm_within": lambda layer: eqxreg.UnitNormConstraint(
        eqxreg.Constraint(layer, "weight", eqxreg.Box(-0.2, 0.2)), "weight"
    ),
    "relative": lambda layer: eqxreg.Constraint(
        layer, "weight", eqxreg.Relative(eqxreg.MinMaxNorm(0.5, 2.0))
    ),
}
INVARIANT = list(WRAPPERS)[:8]


@pytest.mark.parametrize("name", list(WRAPPERS))
def test_scale_invariant_weights_are_those_whose_size_does_not_matter(name, key):
    layer = WRAPPERS[name](eqx.nn.Linear(4, 3, key=key))
    chosen = eqxreg.trainables(layer, eqxreg.scale_invariant)
    inner = layer
    while not isinstance(inner, eqx.nn.Linear):
        inner = inner.layer
    smaller = lambda leaf: 0.3 * leaf if leaf is inner.weight else leaf
    rebuilt = jax.tree.map(smaller, layer)
    x = jnp.linspace(-1.0, 1.0, 4)
    size_matters = not np.allclose(layer(x), rebuilt(x), rtol=1e-4, atol=1e-5)
    assert size_matters == (name not in INVARIANT)
    assert [c is inner.weight for c in chosen] == [True] * (not size_matters)


def test_decay_of_a_scale_invariant_weight_only_lengthens_its_steps(key):
    """The angle of a step of gradient descent goes with one over the square of the
    norm."""
    layer = eqxreg.UnitNormConstraint(eqx.nn.Linear(6, 4, key=key), "weight")
    x = jnp.linspace(-1.0, 1.0, 6)

    def angle(layer):
        grads = eqx.filter_grad(lambda layer: jnp.sum(layer(x) ** 3))(layer)
        before = exact(layer.layer.weight)
        after = before - 1e-4 * exact(grads.layer.weight)
        cross = after - before * (after * before).sum() / (before**2).sum()
        return np.linalg.norm(cross) / np.linalg.norm(before)

    small = eqx.tree_at(lambda t: t.layer.weight, layer, 0.5 * layer.layer.weight)
    np.testing.assert_allclose(angle(small), 4 * angle(layer), rtol=1e-3)
