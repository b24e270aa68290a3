"""`SpectralScaleConstraint`: what is inside stays, bit for bit, and what is outside
goes to the bound; measured by numpy in float64."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import filter_jit
from tables import DTYPES, assert_close, clone, exact, sample


pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
SHAPES = pytest.mark.parametrize("input_shape", [None, (2, 6), "any"], ids=str)


def wrap(layer, *args, build=eqxreg.SpectralScaleConstraint, **kwargs):
    return eqx.nn.make_with_state(build)(layer, *args, key=KEY, **kwargs)


def with_weight(layer, weight):
    return eqx.tree_at(lambda n: n.weight, layer, weight)


def largest(weight):
    return np.linalg.norm(exact(weight).reshape(len(weight), -1), 2)


def convolution(dtype="float32", scale=1.0):
    conv = eqx.nn.Conv1d(2, 3, 3, padding=1, use_bias=False, key=KEY)
    return with_weight(conv, sample(dtype, scale, conv.weight.shape))


@SHAPES
def test_a_layer_that_starts_at_zero_stays_near_it(input_shape):
    zero = convolution(scale=0.0)
    step = sample("float32", 1e-6, zero.weight.shape)
    outs = {}
    for build in (eqxreg.SpectralScaleConstraint, eqxreg.SpectralNormConstraint):
        layer, state = wrap(zero, build=build, input_shape=input_shape)
        call = filter_jit(lambda layer, state: layer(jnp.ones((2, 6)), state))
        out, state = call(layer, state)
        assert jnp.all(out == 0)
        moved = eqx.tree_at(lambda m: m.layer.weight, layer, step)
        for _ in range(3):
            out, state = call(moved, state)
        outs[build] = jnp.max(jnp.abs(out))
    at_most, exactly = outs.values()
    assert 0 < at_most < 2e-5
    assert exactly > 0.1


@SHAPES
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_inside_keeps_its_bits_and_its_gradient(dtype, input_shape):
    conv = convolution(dtype, 0.05)
    layer, state = wrap(conv, "weight", 0.9, input_shape=input_shape)
    x = sample(dtype, shape=(2, 6))
    baked = filter_jit(eqxreg.bake)(layer, state).weight
    assert jnp.array_equal(baked, conv.weight) and baked.dtype == conv.weight.dtype

    def loss(layer, state):
        own = (lambda x: layer(x, clone(state))[0]) if state is not None else layer
        return jnp.sum(jnp.real(own(x)) ** 2)

    compute = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    expected, slope = compute(conv, None)
    for mode in (layer, eqx.nn.inference_mode(layer)):
        value, gradient = compute(mode, state)
        assert value == expected
        assert_close(gradient.weight, slope.weight, 1e-6)


def test_a_large_layer_inside_keeps_its_product():
    linear = eqx.nn.Linear(640, 8, key=KEY)
    layer, state = wrap(linear, "weight", 9.0)
    x = sample("float32", shape=(640,))
    out, state = filter_jit(layer)(x, state)
    assert jnp.array_equal(out, filter_jit(linear)(x))
    assert jnp.array_equal(filter_jit(layer)(x), out)


@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-25])
def test_a_weight_outside_goes_to_the_bound(scale):
    linear = eqx.nn.Linear(7, 5, use_bias=False, key=KEY)
    linear = with_weight(linear, sample("float32", scale, (5, 7)))
    cap = 0.9 * scale
    layer, state = wrap(linear, "weight", cap)
    _, state = filter_jit(layer)(jnp.ones(7), state)
    weight = eqxreg.bake(layer, state).weight
    assert largest(weight / scale) == pytest.approx(0.9, rel=1e-3)
    # It is a multiple of the raw one.
    ratio = exact(weight) / exact(linear.weight)
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)


def test_the_gradient_outside_is_that_of_finite_differences():
    weight = sample("float32", shape=(5, 7))
    linear = eqx.nn.Linear(7, 5, use_bias=False, key=KEY)
    layer, state = wrap(with_weight(linear, weight), "weight", 0.9)
    x, y = sample("float32", shape=(7,)), sample("float32", shape=(5,), seed=1)
    loss = lambda layer: jnp.dot(y, layer(x, clone(state))[0])
    gradient = exact(eqx.filter_grad(loss)(layer).weight)

    def expected(weight):
        return exact(y) @ weight @ exact(x) * 0.9 / np.linalg.norm(weight, 2)

    for i, j in np.ndindex(*weight.shape):
        step = np.zeros(weight.shape)
        step[i, j] = 1e-5
        difference = expected(exact(weight) + step) - expected(exact(weight) - step)
        assert gradient[i, j] == pytest.approx(difference / 2e-5, rel=1e-2, abs=1e-3)


def test_a_weight_that_grows_over_the_bound_is_held_there():
    linear = eqx.nn.Linear(6, 5, use_bias=False, key=KEY)
    start = sample("float32", 0.01, (5, 6))
    layer, state = wrap(with_weight(linear, start), "weight", 0.9)
    call = filter_jit(lambda layer, state: layer(jnp.ones(6), state))
    for i in range(40):
        raw = start + sample("float32", 0.03 * i, (5, 6), seed=1)
        layer = eqx.tree_at(lambda m: m.layer.weight, layer, raw)
        out, state = call(layer, state)
        norm = largest(raw)
        factor = min(1, 0.9 / norm)
        assert_close(out, exact(raw).sum(1) * factor, 1e-2)
    assert norm > 2


def test_layers_of_a_stack_and_blocks_count_for_themselves():
    weights = jnp.stack([sample("float32", scale, (5, 6)) for scale in (0.01, 1.0)])
    make = lambda w: with_weight(eqx.nn.Linear(6, 5, key=KEY), w)
    layer, state = wrap(eqx.filter_vmap(make)(weights), "weight", 0.9)
    small, large = eqxreg.bake(layer, state).weight
    assert jnp.array_equal(small, weights[0])
    assert largest(large) == pytest.approx(0.9, rel=1e-3)
    rows = jnp.concatenate([weights[0], weights[1], weights[0]])
    cell = eqx.tree_at(lambda c: c.weight_ih, eqx.nn.GRUCell(6, 5, key=KEY), rows)
    layer, state = wrap(cell, "weight_ih", 0.9, blocks=3)
    _, state = filter_jit(layer)(jnp.ones(6), jnp.ones(5), state)
    first, second, third = jnp.split(eqxreg.bake(layer, state).weight_ih, 3)
    assert jnp.array_equal(first, weights[0]) and jnp.array_equal(third, weights[0])
    assert largest(second) == pytest.approx(0.9, rel=1e-3)


@SHAPES
def test_without_a_state_it_is_computed_anew(input_shape):
    x = sample("float32", shape=(2, 6))
    layer, state = wrap(convolution(), "weight", 0.9, input_shape=input_shape)
    assert_close(layer(x), layer(x, state)[0], 1e-3)


@SHAPES
def test_it_can_be_unbaked(input_shape):
    layer, state = wrap(convolution(), "weight", 0.9, input_shape=input_shape)
    inside = with_weight(convolution(), sample("float32", 0.05, (3, 2, 3), seed=1))
    back = eqxreg.bake(eqxreg.unbake(layer, inside), state)
    assert jnp.array_equal(back.weight, inside.weight)
    outside = with_weight(inside, 100 * inside.weight)
    with pytest.raises(ValueError, match="no raw weight of the model is sent to"):
        eqxreg.unbake(layer, outside)


def test_a_report_says_that_it_is_at_most_and_what_moves():
    # The kernel as a matrix is inside, the convolution is not.
    conv = convolution(scale=0.25)
    assert largest(conv.weight) < 0.9 < eqxreg.operator_norm(conv, (2, 32))
    for input_shape in ((2, 32), "any"):
        layer, state = wrap(conv, "weight", 0.9, input_shape=input_shape)
        [row] = eqxreg.report(layer, state=state).rows
        assert row.map == "SpectralScale(cap=0.9)"
        assert row.distance > 0 and row.active == 1
    layer, state = wrap(conv, "weight", 0.9)
    [row] = eqxreg.report(layer, state=state).rows
    assert row.distance == 0 and row.active == 0


def test_a_bound_that_is_an_array_can_be_replaced():
    linear = eqx.nn.Linear(6, 5, use_bias=False, key=KEY)
    layer, state = wrap(linear, "weight", jnp.asarray(0.1))
    other, _ = wrap(linear, "weight", jnp.asarray(0.2))
    assert_close(2 * layer(jnp.ones(6), clone(state))[0], other(jnp.ones(6), state)[0])
    assert len(eqxreg.trainables(layer)) == 1


def test_a_new_state_can_be_donated():
    layer, state = wrap(convolution(), input_shape="any")
    call = lambda layer, state: layer(jnp.ones((2, 6)), state)
    expected, _ = call(layer, jax.tree.map(jnp.copy, state))
    out, _ = eqx.filter_jit(call, donate="all")(layer, state)
    np.testing.assert_allclose(out, expected, rtol=1e-5)


MISTAKES = [
    ({"cap": 0.0}, "`cap` must be positive"),
    ({"num_power_iterations": True}, "`num_power_iterations` must be a positive int"),
    ({"input_shape": "any", "blocks": 3}, "`blocks=3` with `input_shape='any'`"),
    ({"input_shape": (2,)}, "is no input of this Conv1d"),
]


@pytest.mark.parametrize("kwargs, message", MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        wrap(convolution(), **kwargs)
