"""Transforms pair updates, parameters, masks and states by path: whole models as
parameters, gradients of a part, and trees that do not fit."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import filter_jit, jit
from tables import exact, sample


pytestmark = pytest.mark.usefixtures("quick_compilation")

X = jnp.linspace(-1.0, 1.0, 8)
RATE = 0.1


class Model(eqx.Module):
    """A network with leaves of all kinds: functions, an integer, a boolean, counters
    and, last in the order of leaves, weights."""

    act: object
    flag: bool
    number: int
    steps: jax.Array
    layers: eqx.nn.Sequential

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.act, self.flag, self.number = jax.nn.tanh, True, 3
        self.steps = jnp.arange(3)
        self.layers = eqx.nn.Sequential(
            [
                eqx.nn.Linear(8, 8, key=first),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.Linear(8, 8, key=second),
            ]
        )

    def __call__(self, x):
        return self.act(self.layers(x))


@pytest.fixture
def model(key):
    return Model(key)


def params_of(model):
    return eqx.filter(model, eqx.is_inexact_array)


def loss(model):
    return jnp.sum((model(X) - 1.0) ** 2)


def arrays(tree):
    return eqxreg.trainables(tree, eqxreg.everything, paths=True)


def assert_same(a, b, **kwargs):
    for (path, x), (other, y) in zip(arrays(a), arrays(b), strict=True):
        assert path == other
        np.testing.assert_allclose(exact(x), exact(y), **{"rtol": 0, **kwargs})


ONES = Model(jax.random.key(1))
TRANSFORMS = {
    "project": lambda mask: eqxreg.project(eqxreg.MaxNorm(0.5, "unit"), mask=mask),
    "every": lambda mask: eqxreg.project(
        eqxreg.MaxNorm(0.5, "unit"), 2, mask, momentum="tangent"
    ),
    "cap": lambda mask: eqxreg.project(eqxreg.SpectralCap(0.5), mask=mask),
    "relative": lambda mask: eqxreg.project(
        eqxreg.Relative(eqxreg.UnitNorm()), mask=mask
    ),
    "soft": lambda mask: eqxreg.soft_threshold(0.4, learning_rate=RATE, mask=mask),
    "group": lambda mask: eqxreg.group_soft_threshold(
        2.0, learning_rate=RATE, mask=mask
    ),
    "elastic": lambda mask: eqxreg.elastic_net_prox(
        0.4, 0.1, learning_rate=RATE, mask=mask
    ),
    "decay": lambda mask: eqxreg.weight_decay(0.1, mask),
    "sign": lambda mask: eqxreg.sign_decay(0.1, mask),
    "cautious": lambda mask: eqxreg.cautious_weight_decay(0.1, mask),
    "corrected": lambda mask: eqxreg.corrected_weight_decay(0.1, RATE, mask=mask),
    "independent": lambda mask: eqxreg.independent_weight_decay(0.1, RATE, mask=mask),
    "towards": lambda mask: eqxreg.decay_towards(ONES, 0.1, mask),
}
each_transform = pytest.mark.parametrize("name", list(TRANSFORMS))


def train(optimiser, model, views, steps=3):
    """The model after some steps, with `init` and `update` given what `views` make of
    it."""
    first, later = views
    state = optimiser.init(first(model))

    @filter_jit
    def step(model, state):
        grads = eqx.filter_grad(loss)(model)
        updates, state = optimiser.update(grads, state, later(model))
        return eqx.apply_updates(model, updates), state

    for _ in range(steps):
        model, state = step(model, state)
    return model


def whole(model):
    return model


@each_transform
def test_a_whole_model_is_as_good_as_its_filtered_form(name, model):
    optimiser = optax.chain(optax.scale(-RATE), TRANSFORMS[name](eqxreg.weights))
    expected = train(optimiser, model, (params_of, params_of))
    assert not jnp.array_equal(expected.layers[2].weight, model.layers[2].weight)
    for views in ((whole, whole), (whole, params_of), (params_of, whole)):
        assert_same(train(optimiser, model, views), expected)


def test_a_whole_model_is_projected_where_it_should_be(model):
    # The sum of squares in numpy; the bias of the last layer once became a matrix.
    optimiser = optax.chain(
        optax.sgd(RATE), eqxreg.project(eqxreg.MaxNorm(0.5, axis="unit"))
    )
    new = train(optimiser, model, (params_of, whole), steps=1)
    assert new.layers[2].bias.shape == (8,)
    for layer in (new.layers[0], new.layers[2]):
        assert np.linalg.norm(exact(layer.weight), axis=1).max() <= 0.5 * (1 + 1e-6)


def test_decay_of_a_whole_model_is_that_of_optax(model):
    grads = eqx.filter_grad(loss)(model)
    theirs = optax.add_decayed_weights(0.3)
    expected, _ = theirs.update(grads, theirs.init(params_of(model)), model)
    ours = eqxreg.weight_decay(0.3)
    actual, _ = ours.update(grads, ours.init(params_of(model)), model)
    assert jax.tree.structure(actual) == jax.tree.structure(grads)
    assert_same(actual, expected, rtol=1e-6)


# Gradients of a part


def only_the_last(model):
    keep = jax.tree.map(lambda _: False, model)
    keep = eqx.tree_at(lambda m: m.layers[2].weight, keep, True)
    return eqx.partition(model, keep)


@each_transform
@pytest.mark.parametrize("view", [whole, params_of])
def test_where_there_is_no_gradient_nothing_moves(name, view, model):
    transform = TRANSFORMS[name](eqxreg.weights)
    optimiser = optax.chain(optax.scale(-RATE), transform)
    state = optimiser.init(params_of(model))
    part, rest = only_the_last(model)

    def loss_of_part(part):
        return loss(eqx.combine(part, rest))

    grads = eqx.filter_grad(loss_of_part)(part)
    updates, after = optimiser.update(grads, state, view(model))
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    new = eqx.apply_updates(model, updates)
    assert new.layers[0] is model.layers[0] or eqx.tree_equal(
        new.layers[0], model.layers[0]
    )
    # What moves, moves as with the gradients of all.
    all_grads = eqx.filter_grad(loss)(model)
    expected, _ = optimiser.update(all_grads, state, params_of(model))
    assert_same(
        updates.layers[2].weight, expected.layers[2].weight, rtol=1e-6, atol=1e-8
    )


def test_nothing_is_done_where_nothing_selected_has_a_gradient(model):
    part = eqx.filter(model, jax.tree.map(lambda _: False, model))
    for build in TRANSFORMS.values():
        transform = build(eqxreg.weights)
        state = transform.init(params_of(model))
        updates, after = transform.update(part, state, model)
        assert jax.tree.leaves(updates) == []
        assert jax.tree.structure(after) == jax.tree.structure(state)


def test_static_fields_of_gradients_may_differ(key):
    layer = eqx.nn.Linear(8, 8, key=key)
    wrapped = eqxreg.MaxNormConstraint(layer, "weight", 2.0)
    other = eqxreg.MaxNormConstraint(layer, "weight", 3.0)
    grads = jax.tree.map(jnp.zeros_like, params_of(other))
    for build in TRANSFORMS.values():
        if build is TRANSFORMS["towards"]:
            continue
        transform = build(eqxreg.weights)
        updates, _ = transform.update(grads, transform.init(wrapped), wrapped)
        assert jax.tree.structure(updates) == jax.tree.structure(grads)
        assert updates.layer.bias is grads.layer.bias


# Trees that do not fit


def test_updates_of_other_parameters_are_an_error(model):
    params = {"weight": jnp.ones((2, 3))}
    for build in (TRANSFORMS["project"], TRANSFORMS["soft"], TRANSFORMS["decay"]):
        transform = build(eqxreg.weights)
        state = transform.init(params)
        with pytest.raises(ValueError, match=r"`updates` has .* `\[0\]`.*`par"):
            transform.update([jnp.ones((2, 3))], state, params)
        with pytest.raises(ValueError, match=r"`updates` has .*\(3,\).*one of.*\(2, 3"):
            transform.update({"weight": jnp.ones(3)}, state, params)
        with pytest.raises(ValueError, match=r"`updates` has an array at .*lay"):
            transform.update(params_of(model), state, params)


LINEAR = eqx.nn.Linear(4, 3, key=jax.random.key(0))
MASKS = {
    "of the model": eqxreg.weights(LINEAR),
    "of the filtered model": eqxreg.weights(params_of(LINEAR)),
    "integers": jax.tree.map(int, eqxreg.weights(LINEAR)),
    "numpy": jax.tree.map(np.bool_, eqxreg.weights(LINEAR)),
    "function": lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
    "function to integers": lambda tree: jax.tree.map(lambda x: int(x.ndim > 1), tree),
}


@pytest.mark.parametrize("name", list(MASKS))
def test_a_mask_may_be_of_the_model_or_of_its_filtered_form(name):
    zeros = jax.tree.map(jnp.zeros_like, params_of(LINEAR))
    for params in (LINEAR, params_of(LINEAR)):
        decay = eqxreg.weight_decay(0.5, MASKS[name])
        updates, _ = decay.update(zeros, decay.init(params), params)
        np.testing.assert_allclose(updates.weight, 0.5 * LINEAR.weight)
        assert jnp.all(updates.bias == 0)


def test_a_mask_may_say_something_of_a_part_as_a_whole(model):
    mask = {"a": True, "b": False}
    params = {"a": params_of(model), "b": model}
    zeros = jax.tree.map(jnp.zeros_like, jax.tree.map(params_of, params))
    zeros = {key: jax.tree.map(jnp.zeros_like, params_of(model)) for key in params}
    decay = eqxreg.weight_decay(1.0, mask)
    updates, _ = decay.update(zeros, decay.init(params), params)
    assert_same(updates["a"], params_of(model))
    assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(updates["b"]))


def test_a_mask_of_other_parameters_is_an_error():
    params = {"weight": jnp.ones(3), "bias": jnp.ones(3)}
    decay = eqxreg.weight_decay(0.1, {"weight": True})
    with pytest.raises(ValueError, match=r"`mask` says nothing of.*\['bias'\]"):
        decay.init(params)
    decay = eqxreg.weight_decay(0.1, lambda tree: {"weight": 2, "bias": 0})
    with pytest.raises(ValueError, match="`mask` must be a function to a tree of bool"):
        decay.init(params)


# States of other parameters


def frozen_first(model):
    first = eqxreg.select(
        names=("weight", "bias"), where=lambda path, *_: "layers[0]" in path
    )
    return eqxreg.freeze(model, first)


def test_a_state_from_before_freezing_has_the_references_of_each_layer(key):
    mlp = eqx.nn.MLP(8, 8, 8, depth=2, key=key)
    reference = jax.tree.map(lambda w: w + 1 if eqx.is_array(w) else w, mlp)
    decay = eqxreg.decay_towards(reference, 1.0)
    state = decay.init(params_of(mlp))
    frozen = params_of(frozen_first(mlp))
    zeros = jax.tree.map(jnp.zeros_like, frozen)
    updates, _ = jit(decay.update)(zeros, state, frozen)
    # Every reference is the weight plus one.
    for _, update in arrays(updates):
        np.testing.assert_allclose(exact(update), -1.0, rtol=1e-5)
    assert len(arrays(updates)) == 4


@pytest.mark.parametrize("name", ["project", "every", "cap", "relative"])
def test_a_projection_goes_on_after_freezing(name, key):
    mlp = eqx.nn.MLP(8, 8, 8, depth=2, key=key)
    transform = TRANSFORMS[name](eqxreg.weights)
    state = transform.init(params_of(mlp))
    frozen = params_of(frozen_first(mlp))
    steps = jax.tree.map(lambda w: 0.3 * w, frozen)
    update = jit(transform.update)
    for _ in range(2):
        updates, after = update(steps, state, frozen)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        state = after
    fresh = transform.init(frozen)
    for _ in range(2):
        expected, fresh = update(steps, fresh, frozen)
    assert_same(updates, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["towards", "every", "cap", "relative"])
def test_a_state_that_lacks_a_weight_asks_for_a_new_one(name, key):
    mlp = eqx.nn.MLP(8, 8, 8, depth=2, key=key)
    build = TRANSFORMS[name]
    if name == "towards":
        build = lambda mask: eqxreg.decay_towards(mlp, 0.1, mask)
    transform = build(eqxreg.weights)
    state = transform.init(params_of(frozen_first(mlp)))
    params = params_of(mlp)
    with pytest.raises(ValueError, match=r"`state` .*`.layers\[0\].weight`.*init"):
        transform.update(params, state, params)
    # A new head, of other sizes.
    state = transform.init(params)
    wide = eqx.nn.Linear(8, 12, key=key)
    params = eqx.tree_at(lambda m: m.layers[2], params, params_of(wide))
    with pytest.raises(ValueError, match=r"`state` .*`.layers\[2\].weight`.*init"):
        transform.update(params, state, params)


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_states_are_carried_by_scan_stacked_by_vmap_and_donated(name):
    params = {"b": {"weight": sample("float32", shape=(6, 5))}, "a": None}
    transform = TRANSFORMS[name](eqxreg.weights)
    if name == "towards":
        zeros = {"b": {"weight": jnp.zeros((6, 5))}}
        transform = eqxreg.decay_towards(zeros, 0.1)

    def body(carry, _):
        params, state = carry
        steps = jax.tree.map(lambda w: -0.1 * w, params)
        updates, state = transform.update(steps, state, params)
        return (optax.apply_updates(params, updates), state), None

    def run(params):
        carry = params, transform.init(params)
        return jax.lax.scan(body, carry, length=3)[0][0]

    stack = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), params)
    together = jit(jax.vmap(run))(stack)
    alone = [jit(run)(jax.tree.map(lambda w: w[i], stack)) for i in range(2)]  # noqa: B023
    expected = jnp.stack([one["b"]["weight"] for one in alone])
    np.testing.assert_allclose(together["b"]["weight"], expected, rtol=1e-5, atol=1e-6)

    state = jax.vmap(transform.init)(stack)
    step = filter_jit(lambda *given: jax.vmap(transform.update)(*given), donate="all")
    copies = jax.tree.map(jnp.copy, (stack, state, stack))
    after = step(*copies)[1]
    assert jax.tree.structure(after) == jax.tree.structure(state)
