"""Frozen arrays in code that goes by `eqx.is_array`, in casts, in checkpoints and in
Equinox's wrappers: what it did, or an error that says why not."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from tables import assert_close


# Averages and casts of numbers and integers are not clean under strict promotion.
pytestmark = pytest.mark.usefixtures("quick_compilation", "standard_promotion")

X = jnp.linspace(-1.0, 1.0, 4)
FIRST = eqxreg.select(where=lambda path, *_: "layers[0]" in path)


def network(seed=0, dtype="float32"):
    mlp = eqx.nn.MLP(4, 2, 8, depth=1, key=jax.random.key(seed))
    return eqxreg.cast(mlp, dtype)


def tree_map(fn, *trees):
    """By `eqx.is_array`, as many write it."""
    parts = [eqx.partition(tree, eqx.is_array) for tree in trees]
    return eqx.combine(jax.tree.map(fn, *(a for a, _ in parts)), parts[0][1])


COMPUTED = {
    "average": lambda a, b: optax.incremental_update(a, b, 0.005),
    "mean of two": lambda a, b: (a + b) / 2,
    "soup": lambda a, b: jnp.mean(jnp.stack([a, b]), axis=0),
    "cast": lambda a, b: a.astype(jnp.bfloat16),
    "cast to half": lambda a, b: a.astype(jnp.float16),
    "noise": lambda a, b: a + 0.01,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", COMPUTED)
def test_what_was_computed_with_is_an_error_when_it_is_read(name, dtype):
    model = eqxreg.freeze(network(dtype=dtype), FIRST)
    other = tree_map(COMPUTED[name], model, model)
    message = r"frozen.*eqx\.is_inexact_array.*eqxreg\.(thaw|cast)"
    reads = {
        "call": lambda: other(X),
        "compiled call": lambda: eqx.filter_jit(other)(X),
        "bake": lambda: eqxreg.bake(other),
        "thaw": lambda: eqxreg.thaw(other),
        "attribute": lambda: other.layers[0].weight + 1,
        "report": lambda: eqxreg.report(other),
    }
    for read in reads.values():
        with pytest.raises(ValueError, match=message):
            read()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_out_of_one_vector_comes_what_went_in(dtype):
    model = eqxreg.freeze(network(dtype=dtype), FIRST)
    params, static = eqx.partition(model, eqx.is_array)
    flat, unravel = ravel_pytree(params)
    assert eqx.tree_equal(eqx.combine(unravel(flat), static), model)
    compiled = jax.jit(lambda flat: eqx.combine(unravel(flat), static)(X))
    assert_close(compiled(flat), eqx.filter_jit(model)(X))
    # And so does a vector that moves as its gradient says.
    gradient = jax.grad(lambda f: jnp.sum(eqx.combine(unravel(f), static)(X) ** 2))
    after = eqx.combine(unravel(flat - 0.1 * gradient(flat)), static)
    assert eqx.tree_equal(after.layers[0].layer.weight, model.layers[0].layer.weight)
    assert not jnp.array_equal(after.layers[1].weight, model.layers[1].weight)


def test_averages_by_floating_arrays_are_right():
    model, other = (eqxreg.freeze(network(seed), FIRST) for seed in (0, 1))
    both = [eqx.partition(m, eqx.is_inexact_array) for m in (model, other)]
    (params, static), (others, _) = both
    mean = eqx.combine(optax.incremental_update(others, params, 0.25), static)
    assert jnp.array_equal(mean.layers[0].weight, network(0).layers[0].weight)
    expected = 0.25 * network(1).layers[1].weight + 0.75 * network(0).layers[1].weight
    np.testing.assert_allclose(mean.layers[1].weight, expected, rtol=1e-6)


@pytest.mark.parametrize("optimiser", [optax.adam, optax.adamw, optax.lion])
def test_an_optimiser_of_all_arrays_says_what_to_filter_by(optimiser):
    model = eqxreg.freeze(network(), FIRST)
    optimiser = optimiser(1e-3)
    grads = eqx.filter_grad(lambda m: jnp.sum(m(X) ** 2))(model)
    params = eqx.filter(model, eqx.is_array)
    try:
        updates, _ = optimiser.update(grads, optimiser.init(params), params)
    except ValueError as error:
        text = "frozen_so_filter_by_is_inexact_array"
        assert text in str(error) or not _names_leaves()
    else:
        # Some versions of Optax leave alone what has no gradient.
        after = eqx.apply_updates(model, updates)
        assert jnp.array_equal(after.layers[0].weight, model.layers[0].weight)


def _names_leaves():
    """Whether JAX says where two trees differ, which the oldest versions do not."""
    try:
        jax.tree.map(lambda a, b: a, {"key": None}, {"key": jnp.ones(2)})
    except ValueError as error:
        return "key" in str(error)
    return False


@pytest.mark.parametrize("optimiser", [optax.sgd(0.1), optax.sgd(0.1, momentum=0.9)])
def test_where_such_an_optimiser_runs_it_is_right(optimiser):
    model = eqxreg.freeze(network(), FIRST)
    grads = eqx.filter_grad(lambda m: jnp.sum(m(X) ** 2))(model)
    params = eqx.filter(model, eqx.is_array)
    updates, _ = optimiser.update(grads, optimiser.init(params), params)
    after = eqx.apply_updates(model, updates)
    frozen = lambda m: m.layers[0].layer.weight
    assert eqx.tree_equal(frozen(after), frozen(model))
    expected = model.layers[1].weight - 0.1 * grads.layers[1].weight
    np.testing.assert_allclose(after.layers[1].weight, expected, rtol=1e-6)


# Casts


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_reaches_frozen_arrays(dtype):
    model = eqxreg.constrain(network(), eqxreg.Cayley())
    frozen = eqxreg.freeze(model, FIRST)
    cast = eqxreg.cast(frozen, dtype)
    assert jax.tree.structure(eqxreg.thaw(cast)) == jax.tree.structure(model)
    for layer in (cast.layers[0].layer.layer, cast.layers[1].layer):
        assert layer.weight.dtype == layer.bias.dtype == dtype
    assert cast(X.astype(dtype)).dtype == dtype
    # What maps hold is rounded when it is used, and not before.
    assert cast.layers[1].parametrization.base.dtype == jnp.float32
    expected = network().layers[0].bias.astype(dtype)
    assert jnp.array_equal(jnp.asarray(cast.layers[0].layer.layer.bias), expected)


def test_a_cast_leaves_state_and_integers_alone(key):
    cell = eqxreg.freeze(eqx.nn.GRUCell(4, 3, key=key), eqxreg.everything)
    half = eqxreg.cast(cell, jnp.bfloat16)
    h = jnp.zeros(3, jnp.bfloat16)
    step = lambda h, x: (half(x, h), None)
    last, _ = jax.lax.scan(step, h, jnp.ones((5, 4), jnp.bfloat16))
    assert last.dtype == jnp.bfloat16
    norm = eqx.nn.BatchNorm(4, "batch", mode="ema")
    [mean, _] = eqxreg.cast(norm, jnp.bfloat16).ema_state_index.init
    assert mean.dtype == jnp.float32
    assert (
        eqxreg.cast({"n": jnp.arange(3), "f": max}, jnp.bfloat16)["n"].dtype
        == jnp.int32
    )
    with pytest.raises(TypeError, match=r"`dtype` must be a floating one, got int32"):
        eqxreg.cast(cell, jnp.int32)


def test_a_cast_that_does_not_see_frozen_arrays_is_told(key):
    """Such a cast leaves them in single precision, as a scan would find much later."""

    def cast(model):
        to_half = lambda x: x.astype("bfloat16") if eqx.is_inexact_array(x) else x
        return jax.tree.map(to_half, model)

    half = X.astype("bfloat16")
    partly = cast(eqxreg.freeze(network(), eqxreg.weights))
    for call in (lambda: partly(half), lambda: eqxreg.bake(partly)):
        with pytest.raises(ValueError, match=r"frozen.*float32.*`eqxreg\.cast"):
            call()
    whole = cast(eqxreg.freeze(eqx.nn.Linear(4, 3, key=key), eqxreg.everything))
    with pytest.warns(UserWarning, match=r"frozen Linear of float32 is given bfloat16"):
        whole(half)
    # Nothing is said of what is meant: more precision than what is frozen.
    gain = eqxreg.WeightNormConstraint(
        eqxreg.cast(eqx.nn.Linear(4, 3, key=key), "bfloat16")
    )
    frozen = eqxreg.freeze(gain, eqxreg.select(names="weight"))
    assert frozen(half).dtype == "bfloat16"
    assert eqxreg.freeze(network(), eqxreg.everything)(X).dtype == "float32"


# Checkpoints


def test_checkpoints_load_either_way(tmp_path):
    plain, other = network(0), network(1)
    frozen = eqxreg.freeze(plain, FIRST)
    path = tmp_path / "model"
    eqx.tree_serialise_leaves(path, eqxreg.thaw(frozen))
    loaded = eqx.tree_deserialise_leaves(path, eqxreg.thaw(other))
    assert jnp.array_equal(loaded(X), plain(X))
    # Into a model that is frozen otherwise, or constrained too.
    layers = tuple(eqxreg.WeightNormConstraint(layer) for layer in other.layers)
    wrapped = eqx.tree_at(lambda m: m.layers, other, layers)
    elsewhere = eqxreg.freeze(wrapped, eqxreg.weights)
    again = eqxreg.unbake(elsewhere, loaded)
    np.testing.assert_allclose(again(X), plain(X), rtol=1e-6)
    assert jax.tree.structure(again) == jax.tree.structure(elsewhere)


# Equinox's wrappers, and `tree_at`


def test_equinox_wrappers_around_frozen_layers_compute_what_they_did(key):
    linear = eqx.nn.Linear(4, 3, key=key)
    frozen = eqxreg.Frozen(linear)
    expected, actual = eqx.nn.WeightNorm(linear), eqx.nn.WeightNorm(frozen)
    assert jnp.array_equal(actual(X), expected(X))
    call = lambda m: jnp.sum(m(X) ** 2)
    grads, others = eqx.filter_grad(call)(actual), eqx.filter_grad(call)(expected)
    np.testing.assert_allclose(grads.g, others.g, rtol=1e-6)
    assert jax.tree.leaves(grads.layer) == []
    baked = eqxreg.bake(actual)
    assert jnp.allclose(baked.weight, eqxreg.bake(expected).weight)

    def spectral(layer):
        build = eqx.nn.make_with_state(eqx.nn.SpectralNorm)
        return build(layer, "weight", key=key)

    outputs = [m(X, state)[0] for m, state in map(spectral, (linear, frozen))]
    assert jnp.array_equal(*outputs)


def test_a_frozen_array_is_computed_with_as_an_array(key):
    linear = eqx.nn.Linear(4, 3, key=key)
    weight = eqxreg.Frozen(linear).weight
    w = linear.weight
    assert weight.dtype == w.dtype and weight.shape == (3, 4) and weight.size == 12
    for actual, expected in (
        (weight @ X, w @ X),
        (jnp.ones(3) @ weight, jnp.ones(3) @ w),
        (2 * weight - 1, 2 * w - 1),
        (weight[0], w[0]),
        (weight.T, w.T),
        (weight.at[0].set(0), w.at[0].set(0)),
        (jnp.linalg.norm(weight), jnp.linalg.norm(w)),
        (jnp.einsum("ij,j", weight, X), jnp.einsum("ij,j", w, X)),
        (np.asarray(weight), np.asarray(w)),
        (abs(-weight), abs(w)),
        (weight > 0, w > 0),
    ):
        assert np.array_equal(actual, expected)


def test_tree_at_puts_an_ordinary_array_there(key):
    frozen = eqxreg.Frozen(eqx.nn.Linear(4, 3, key=key))
    new = eqx.tree_at(lambda m: m.weight, frozen, jnp.zeros((3, 4)))
    assert jnp.array_equal(new(X), frozen.bias.value)
    again = eqxreg.Frozen(eqxreg.thaw(new))
    assert jax.tree.structure(again) == jax.tree.structure(frozen)


def test_tree_at_of_what_it_cannot_reach_says_why(key):
    frozen = eqxreg.Frozen(eqx.nn.MultiheadAttention(2, 4, key=key))
    where = lambda m: m.query_proj.weight
    with pytest.raises(ValueError, match=r"frozen.*Use `eqxreg\.thaw\(model\)` first"):
        eqx.tree_at(where, frozen, jnp.zeros((4, 4)))


def test_a_frozen_sequence_is_a_sequence(key):
    layers = [eqx.nn.Linear(4, 4, key=key), eqx.nn.Lambda(jnp.tanh)]
    frozen = eqxreg.Frozen(eqx.nn.Sequential(layers))
    assert len(frozen) == 2
    assert jnp.array_equal(frozen[0](X), layers[0](X))
    assert [type(layer) for layer in frozen] == [eqx.nn.Linear, eqx.nn.Lambda]
    assert isinstance(frozen[:1], eqx.nn.Sequential)
    wrapped = eqxreg.MaxNormConstraint(frozen, "layers.0.weight", 0.1)
    assert jnp.linalg.norm(wrapped[0].weight) <= 0.1
    with pytest.raises(TypeError, match="Linear"):
        len(eqxreg.Frozen(layers[0]))
