"""Bounds that are arrays: signs for each column, regions of trust, rounding."""

import re

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eqxreg._models._report import _label
from jax.test_util import check_grads
from tables import exact, sample


SIGNS = np.asarray([1.0, -1.0, 1.0, -1.0])
LOWER = np.where(SIGNS > 0, 0.0, -np.inf)
UPPER = np.where(SIGNS > 0, np.inf, 0.0)
DTYPES = ("float16", "bfloat16", "float32")


@eqx.filter_jit
def applied(p, weight):
    return p(weight)


def bounds(shape=(3, 4), seed=7):
    """Two arrays of bounds, in order, in double precision."""
    rng = np.random.default_rng(seed)
    lower, width = rng.standard_normal(shape), rng.uniform(0.5, 1, shape)
    return lower, lower + width


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4), (4,), (3, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_a_result_is_between_bounds_of_higher_precision(dtype, shape, kind):
    lower, upper = map(kind, bounds(shape))
    weight = sample(dtype, 3.0, (3, 4))
    result = exact(applied(eqxreg.Box(lower, upper), weight))
    lower, upper = map(exact, (lower, upper))
    # In double precision, though the dtype holds none of these bounds.
    assert np.all(lower <= result) and np.all(result <= upper)
    nearest = np.clip(exact(weight), lower, upper)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(result, nearest, rtol=2 * eps, atol=eps)
    inside = (exact(weight) >= lower) & (exact(weight) <= upper)
    assert np.array_equal(result[inside], exact(weight)[inside])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["float32", "float16", "bfloat16"])
def test_a_traced_bound_is_rounded_to_the_inside(dtype, given):
    for number in (0.1, 0.3, 3.3333, 1000.5):
        bound = jnp.asarray(number, given)
        box = jax.jit(lambda bound, w: eqxreg.Box(-bound, bound)(w))
        result = exact(box(bound, jnp.asarray([-9e3, 9e3], dtype)))
        assert np.all(np.abs(result) <= exact(bound)), number
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.abs(result), exact(bound), rtol=2 * eps)


def test_equal_bounds_that_no_float_holds_are_in_order():
    values = np.asarray([0.1, 0.7, -0.3])
    result = exact(eqxreg.Box(values, values)(jnp.zeros(3)))
    np.testing.assert_allclose(result, values, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("build", [eqxreg.Box, eqxreg.Interval])
def test_derivatives_match_finite_differences(build):
    p = build(*bounds())
    weight = sample("float64", shape=(3, 4))
    check_grads(jax.jit(lambda w: p(w)), (weight,), order=2, eps=1e-5)


def test_entries_at_a_bound_have_a_gradient_and_those_beyond_have_none():
    lower, upper = jnp.asarray([0.0, -1.0, 0.0]), jnp.asarray([1.0, 0.0, jnp.inf])
    weight = jnp.asarray([[0.0, -2.0, 5.0], [2.0, 0.0, -1.0]])
    gradient = jax.grad(lambda w: jnp.sum(eqxreg.Box(lower, upper)(w)))(weight)
    assert np.array_equal(gradient, [[1, 0, 1], [0, 1, 0]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_interval_of_arrays_is_open_and_inverts(dtype):
    lower, upper = bounds()
    p = eqxreg.Interval(lower, upper)
    raw = jnp.asarray([[-1e4, -9.0, 9.0, 1e4]] * 3, dtype)
    result = exact(p(raw))
    assert np.all(lower < result) and np.all(result < upper)
    weight = jnp.asarray((lower + upper) / 2, dtype)
    again = exact(p(p.inverse(weight)))
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(again, exact(weight), rtol=8 * eps, atol=8 * eps)
    with pytest.raises(ValueError, match="strictly between"):
        p.inverse(jnp.full((3, 4), 9.0, dtype))


def train(model, optimiser, steps=30):
    @eqx.filter_jit
    def step(model, state, key):
        x = jax.random.normal(key, (16, 4))
        loss = lambda m: jnp.mean((jax.vmap(m)(x) - x[:, :3] * 5) ** 2)
        gradient = eqx.filter_grad(loss)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(gradient, state, params)
        return eqx.apply_updates(model, updates), state

    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    for key in jax.random.split(jax.random.key(1), steps):
        model, state = step(model, state, key)
    return model


@pytest.mark.parametrize("place", ["wrapper", "projection"])
def test_columns_keep_their_signs_through_training(place, key):
    """Dale's law, under an optimiser that decays all that it is given."""
    linear, adamw = eqx.nn.Linear(4, 3, key=key), optax.adamw(0.1, weight_decay=0.1)
    if place == "wrapper":
        layer = eqxreg.BoxConstraint(linear, "weight", LOWER, UPPER)
        trained = eqxreg.bake(train(layer, adamw))
    else:
        chain = optax.chain(adamw, eqxreg.project(eqxreg.Box(LOWER, UPPER)))
        trained = train(linear, chain)
    weight = exact(trained.weight)
    assert np.all(weight * SIGNS >= 0) and np.any(weight != 0)
    # Without the bounds, signs do not stay.
    assert not np.all(exact(train(linear, adamw).weight) * SIGNS >= 0)


def test_a_region_of_trust_holds_weights_near_others(key):
    linear = eqx.nn.Linear(4, 3, key=key)
    start = linear.weight
    box = eqxreg.Box(start - 0.1, start + 0.1)
    chain = optax.chain(optax.adam(0.1), eqxreg.project(box))
    moved = np.abs(exact(train(linear, chain).weight) - exact(start))
    np.testing.assert_allclose(moved.max(), 0.1, rtol=1e-5)


def test_bounds_hold_for_each_layer_of_a_stack(key):
    linear = lambda key: eqx.nn.Linear(4, 3, key=key)
    wrap = lambda layer: eqxreg.BoxConstraint(layer, "weight", LOWER, UPPER)
    keys = jax.random.split(key, 2)
    stack = eqx.filter_vmap(linear)(keys)
    expected = np.clip(exact(stack.weight), LOWER, UPPER)
    wrapped = wrap(stack)
    for layer in (
        eqxreg.bake(wrapped),
        eqxreg.bake(eqx.filter_vmap(lambda key: wrap(linear(key)))(keys)),
        eqxreg.project_params(stack, eqxreg.Box(LOWER, UPPER)),
    ):
        assert np.array_equal(exact(layer.weight), expected)
    x = sample("float32", shape=(2, 4))
    out = eqx.filter_vmap(lambda layer, x: layer(x))(wrapped, x)
    products = np.einsum("koi,ki->ko", expected, exact(x)) + exact(stack.bias)
    np.testing.assert_allclose(out, products, atol=1e-5)


def test_the_layers_of_a_scanned_model_are_projected_one_by_one(key):
    mlp = eqx.nn.MLP(4, 4, 4, depth=4, scan=True, key=key)
    box = eqxreg.Box(LOWER, UPPER)
    params = eqx.filter(mlp, eqx.is_inexact_array)
    transform = eqxreg.project(box)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transform.update(zeros, transform.init(params), params)
    projected = optax.apply_updates(params, updates)
    for tree in (projected, eqxreg.project_params(mlp, box)):
        found = eqxreg.trainables(tree, eqxreg.weights)
        assert any(weight.ndim == 3 for weight in found)
        for weight in found:
            assert np.all(exact(weight) * SIGNS >= 0)
    stacked = eqxreg.constrain(mlp, box)
    baked = eqxreg.bake(stacked)
    x = jnp.linspace(-1.0, 1.0, 4)
    np.testing.assert_allclose(stacked(x), baked(x), atol=1e-6)


def test_schedules_may_give_arrays_of_bounds():
    size = jnp.asarray([1.0, 2.0])
    transform = eqxreg.project(eqxreg.Box(lambda step: -size, lambda step: size))
    params = {"weight": jnp.full((2, 2), 5.0)}
    zeros = {"weight": jnp.zeros((2, 2))}
    updates, _ = transform.update(zeros, transform.init(params), params)
    result = optax.apply_updates(params, updates)["weight"]
    np.testing.assert_allclose(result, [[1.0, 2.0], [1.0, 2.0]], rtol=1e-6)


def test_bounds_are_constants(key):
    layer = eqxreg.BoxConstraint(
        eqx.nn.Linear(4, 3, key=key), "weight", jnp.asarray(LOWER), jnp.asarray(UPPER)
    )
    assert len(jax.tree.leaves(eqx.filter(layer, eqx.is_inexact_array))) == 2
    loss = lambda upper: jnp.sum(eqxreg.Box(-1.0, upper)(jnp.full(4, 9.0)))
    assert np.array_equal(jax.grad(loss)(jnp.ones(4)), np.zeros(4))


def test_a_bound_may_be_replaced_without_a_new_program():
    traces = []

    @jax.jit
    def clipped(bound, weight):
        traces.append(bound)
        return eqxreg.Box(-bound, bound)(weight)

    for size in (1.0, 2.0):
        result = clipped(jnp.full(4, size), jnp.full((3, 4), 9.0))
        assert np.array_equal(result, np.full((3, 4), size))
    assert len(traces) == 1


def test_a_report_counts_the_entries_at_their_bounds():
    weight = jnp.asarray([[0.0, -1.0], [2.0, 0.0], [3.0, -4.0], [5.0, -6.0]])
    box = eqxreg.Box(np.asarray([0.0, -np.inf]), np.asarray([np.inf, 0.0]))
    [row] = eqxreg.report({"weight": weight}, projection=box).rows
    assert row.active == 2 / 8 and row.distance == 0
    assert _label(box) == "Box(f32[2], f32[2])"


@pytest.mark.parametrize("build", [eqxreg.Box, eqxreg.Interval])
@pytest.mark.parametrize("name", ["lower", "upper"])
@pytest.mark.parametrize("shape", [(3,), (4, 1), (2, 3, 4)], ids=str)
def test_a_bound_that_does_not_fit_the_weight_is_refused(build, name, shape, key):
    arguments = {"lower": -1.0, "upper": 1.0}
    arguments[name] = np.full(shape, arguments[name])
    p, linear = build(**arguments), eqx.nn.Linear(4, 3, key=key)
    params = eqx.filter(linear, eqx.is_inexact_array)
    message = (
        f"`{name}` must have the shape of the weight, (3, 4), or one that broadcasts "
        f"to it, got {shape}."
    )
    calls = [p, p.check, lambda w: eqxreg.Constraint(linear, "weight", p)]
    if isinstance(p, eqxreg.Projection):
        calls.append(lambda w: eqxreg.project(p).init(params))
        calls.append(lambda w: eqxreg.project_params(linear, p))
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(message)):
            call(linear.weight)


REFUSED = {
    "nan": ((np.asarray([0.0, np.nan]), 1.0), "`lower` must be a number, got nan"),
    "crossing": (
        (np.asarray([0.0, 3.0]), jnp.asarray([1.0, 2.0])),
        "`lower` must be at most `upper`, got `lower=3.0` and `upper=2.0`",
    ),
    "crossing a number": (
        (0.5, np.asarray([1.0, 0.25])),
        "got `lower=0.5` and `upper=0.25`",
    ),
    "shapes": (
        (np.zeros(2), np.ones(3)),
        r"shapes that broadcast to each other, got \(2,\) and \(3,\)",
    ),
}


@pytest.mark.parametrize("arguments, text", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_pair_of_bounds_is_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        eqxreg.Box(*arguments)


def test_an_interval_is_finite_in_all_entries():
    for kind in (np.asarray, jnp.asarray):
        with pytest.raises(ValueError, match="`upper` must be finite, got inf.*Positi"):
            eqxreg.Interval(0.0, kind([1.0, np.inf]))
    with pytest.raises(ValueError, match="`lower` must be finite, got -inf"):
        eqxreg.Interval(jnp.asarray(-jnp.inf), 0.0)
