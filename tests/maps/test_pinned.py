"""Entries that are held at given values, and others that are free."""

import re

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eqxreg._models._report import _label
from tables import exact, sample


MASK = np.arange(12).reshape(3, 4) % 3 == 0
DTYPES = ("float16", "bfloat16", "float32", "complex64")


@eqx.filter_jit
def applied(p, weight):
    return p(weight)


def nearest(value, dtype):
    """`value` in a dtype, in double precision."""
    return exact(jnp.asarray(np.asarray(value), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [MASK, jnp.asarray(MASK), MASK[:, :1], MASK[0]])
@pytest.mark.parametrize("value", [0.3, np.linspace(-1, 1, 4), jnp.ones((3, 1))])
def test_held_entries_have_their_values_and_free_ones_keep_their_bits(
    dtype, mask, value
):
    weight = sample(dtype, shape=(3, 4))
    result = applied(eqxreg.Pinned(mask, value), weight)
    expected = np.where(mask, nearest(value, dtype), exact(weight))
    assert result.dtype == weight.dtype
    assert np.array_equal(exact(result), expected)


@pytest.mark.usefixtures("x64")
def test_float64_values_are_exact():
    value = np.random.default_rng(0).standard_normal((3, 4))
    weight = sample("float64", shape=(3, 4))
    for given in (value, jnp.asarray(value)):
        result = applied(eqxreg.Pinned(MASK, given), weight)
        assert np.array_equal(result, np.where(MASK, value, weight))
    assert applied(eqxreg.Pinned(MASK, 0.1), weight)[0, 0] == 0.1


def test_values_may_be_complex_where_the_weight_is():
    weight = sample("complex64", shape=(3, 4))
    for value in (1j, np.full(4, 1j), jnp.asarray(1j)):
        p = eqxreg.Pinned(MASK, value)
        assert np.array_equal(applied(p, weight), np.where(MASK, 1j, weight))
        with pytest.raises(TypeError, match="`value` is complex, and the weight is an"):
            p(jnp.ones((3, 4)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "complex64"])
def test_free_entries_have_the_gradient_of_the_identity_and_held_ones_have_none(dtype):
    weight, cotangent = (sample(dtype, shape=(3, 4), seed=i) for i in range(2))
    p = eqxreg.Pinned(MASK, 0.3)
    expected = np.where(MASK, 0, cotangent)
    assert np.array_equal(jax.vjp(p, weight)[1](cotangent)[0], expected)
    assert np.array_equal(jax.jvp(p, (weight,), (cotangent,))[1], expected)


@pytest.mark.usefixtures("x64")
def test_the_hessian_is_that_of_the_free_entries():
    p = eqxreg.Pinned(MASK, 0.3)
    weight = sample("float64", shape=(3, 4))
    hessian = jax.hessian(lambda w: jnp.sum(p(w) ** 3))(weight).reshape(12, 12)
    expected = np.diag(np.where(MASK, 0, 6 * weight).ravel())
    np.testing.assert_allclose(hessian, expected)


def test_no_gradient_reaches_the_value():
    weight = sample("float32", shape=(3, 4))
    loss = lambda value: jnp.sum(eqxreg.Pinned(MASK, value)(weight) ** 2)
    assert np.array_equal(jax.grad(loss)(jnp.ones((3, 4))), np.zeros((3, 4)))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("at", [(0, 0), (0, 1)], ids=["held", "free"])
def test_nan_and_infinity_stay_visible_in_held_entries_too(bad, at):
    weight = sample("float32", shape=(3, 4)).at[at].set(bad)
    p = eqxreg.Pinned(MASK, 0.3)
    expected = np.where(MASK, np.float32(0.3), weight)
    expected[at] = bad
    np.testing.assert_array_equal(applied(p, weight), expected)
    assert not p.contains(weight)


def test_what_the_dtype_cannot_hold_is_its_largest_number():
    weight = jnp.zeros((3, 4), "float16")
    for value in (1e6, np.full(4, 1e6), jnp.full(4, 1e6), 10**6):
        result = applied(eqxreg.Pinned(MASK, value), weight)
        assert np.array_equal(exact(result), np.where(MASK, 65504.0, 0.0))


def test_the_distance_is_that_of_the_held_entries():
    weight = sample("float32", shape=(3, 4))
    p = eqxreg.Pinned(MASK, 0.3)
    expected = np.linalg.norm((exact(weight) - 0.3)[MASK])
    np.testing.assert_allclose(p.distance(weight), expected, rtol=1e-6)
    assert not p.contains(weight)
    assert p.distance(p(weight)) == 0 and p.contains(p(weight))
    assert p._active(weight) == np.float32(MASK.mean())


def test_a_held_part_of_an_embedding_does_not_train(key):
    embedding = eqx.nn.Embedding(5, 3, key=key)
    old = np.arange(5)[:, None] < 2
    wrapped = eqxreg.Constraint(
        embedding, "weight", eqxreg.Pinned(old, embedding.weight)
    )
    # A layer that is wrapped computes what it did.
    assert np.array_equal(eqxreg.bake(wrapped).weight, embedding.weight)
    trained = train(wrapped, optax.adamw(0.1, weight_decay=0.5))
    same = np.asarray(eqxreg.bake(trained).weight == embedding.weight)
    assert np.array_equal(same, np.broadcast_to(old, same.shape))


def test_projection_holds_entries_to_the_bit(key):
    embedding = eqx.nn.Embedding(5, 3, key=key)
    old = np.arange(5)[:, None] < 2
    p = eqxreg.Pinned(old, embedding.weight)
    chain = optax.chain(
        optax.adamw(0.1, weight_decay=0.5), eqxreg.project(p, mask=eqxreg.embeddings)
    )
    same = np.asarray(train(embedding, chain).weight == embedding.weight)
    assert np.array_equal(same, np.broadcast_to(old, same.shape))


def train(model, optimiser):
    @eqx.filter_jit
    def step(model, state):
        loss = lambda m: sum(jnp.sum((m(i) - 1.0) ** 2) for i in jnp.arange(5))
        gradient = eqx.filter_grad(loss)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(gradient, state, params)
        return eqx.apply_updates(model, updates), state

    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    for _ in range(5):
        model, state = step(model, state)
    return model


def test_a_value_that_is_a_schedule_is_of_the_step():
    params = {"weight": jnp.ones((3, 4))}
    step = lambda count: jnp.where(count >= 0, 2, 2)
    transform = eqxreg.project(eqxreg.Pinned(MASK, step))
    updates, _ = transform.update(params, transform.init(params), params)
    assert np.array_equal(params["weight"] + updates["weight"], np.where(MASK, 2, 2))
    with pytest.raises(ValueError, match="schedule needs a step"):
        eqxreg.Pinned(MASK, step)(params["weight"])


def test_entries_are_held_in_each_layer_of_a_stack(key):
    p = eqxreg.Pinned(MASK, np.linspace(0.0, 1.0, 4))
    linear = lambda key: eqx.nn.Linear(4, 3, key=key)
    within = lambda key: eqxreg.Constraint(linear(key), "weight", p)
    keys = jax.random.split(key, 2)
    stack = eqx.filter_vmap(linear)(keys)
    expected = np.where(MASK, np.linspace(0.0, 1.0, 4, dtype="float32"), stack.weight)
    for layer in (
        eqxreg.bake(eqxreg.Constraint(stack, "weight", p)),
        eqxreg.bake(eqx.filter_vmap(within)(keys)),
        eqxreg.project_params(stack, p),
    ):
        assert np.array_equal(layer.weight, expected)


@pytest.mark.parametrize(
    "value, label",
    [(0.5, "Pinned(bool[3,4], 0.5)"), (np.ones(4), "Pinned(bool[3,4], f32[4])")],
)
def test_a_label_tells_what_is_held(value, label):
    assert _label(eqxreg.Pinned(MASK, value)) == label


@pytest.mark.parametrize(
    "value, error, text",
    [
        (np.nan, ValueError, "`value` must be finite, got nan"),
        (np.asarray([0.0, np.inf]), ValueError, "`value` must be finite, got inf"),
        (complex(0, np.inf), ValueError, "`value` must be finite, got inf"),
        ("one", TypeError, "`value` must be a number, a JAX array.*'one'"),
        (None, TypeError, "`value` must be a number.*None"),
        (MASK, TypeError, "`value` must be of numbers, got an array of bool"),
        ([0.0, 1.0], TypeError, r"Give `jnp.asarray\(...\)` of it"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_a_value_is_finite(value, error, text):
    with pytest.raises(error, match=text):
        eqxreg.Pinned(MASK, value)


@pytest.mark.parametrize("name", ["mask", "value"])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4), (2,)])
def test_mask_and_value_fit_the_weight(name, shape, key):
    arguments = {"mask": np.ones((), bool), "value": 0.0}
    arguments[name] = np.ones(shape, arguments[name].dtype if name == "mask" else float)
    p, layer = eqxreg.Pinned(**arguments), eqx.nn.Linear(4, 3, key=key)
    message = (
        f"`{name}` must have the shape of the weight, (3, 4), or one that broadcasts "
        f"to it, got {shape}."
    )
    for call in (p, lambda w: eqxreg.Constraint(layer, "weight", p)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(layer.weight)


@pytest.mark.usefixtures("unchecked")
def test_a_mask_is_a_boolean_array():
    for mask in (True, [True], np.ones(3)):
        with pytest.raises(TypeError, match="`mask` must be a boolean array"):
            eqxreg.Pinned(mask, 0.0)
