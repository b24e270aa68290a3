"""`SpectralNormConstraint`: its vectors in training, and the true norm of convolutions,
measured on dense Jacobians."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import filter_jit, jit
from tables import assert_close, clone, exact, sample, wrap


pytestmark = pytest.mark.usefixtures("quick_compilation")


def largest(weight):
    return np.linalg.svd(exact(weight).reshape(weight.shape[0], -1), compute_uv=False)[
        0
    ]


def dense_norm(layer, shape):
    """The norm of the Jacobian, by the decomposition of the dense matrix."""
    jacobian = jit(jax.jacobian(layer))(jnp.zeros(shape))
    matrix = exact(jacobian).reshape(-1, int(np.prod(shape)))
    return np.linalg.svd(matrix, compute_uv=False)[0]


CONVOLUTIONS = {
    "plain": (lambda k: eqx.nn.Conv2d(3, 4, 3, key=k), (3, 7, 7)),
    "padding": (lambda k: eqx.nn.Conv1d(3, 4, 3, padding=1, key=k), (3, 9)),
    "stride": (lambda k: eqx.nn.Conv2d(3, 4, 3, 2, padding=1, key=k), (3, 7, 7)),
    "groups": (lambda k: eqx.nn.Conv2d(4, 6, 3, groups=2, key=k), (4, 6, 6)),
    "dilation": (lambda k: eqx.nn.Conv1d(2, 3, 3, dilation=2, key=k), (2, 12)),
    "circular": (
        lambda k: eqx.nn.Conv1d(2, 3, 3, padding=1, padding_mode="CIRCULAR", key=k),
        (2, 9),
    ),
    "transposed": (
        lambda k: eqx.nn.ConvTranspose2d(3, 2, 3, 2, padding=1, key=k),
        (3, 4, 4),
    ),
}


@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_the_operator_of_a_convolution_is_at_the_bound(name, key):
    build, shape = CONVOLUTIONS[name]
    conv = build(key)
    norm = dense_norm(conv, shape)
    found = filter_jit(eqxreg.operator_norm)(conv, shape)
    assert float(found) == pytest.approx(norm, rel=1e-3)
    wrapped, state = wrap(conv, "weight", 0.7, input_shape=shape)
    _, state = jit(lambda x, s: wrapped(x, s))(jnp.ones(shape), state)
    plain = filter_jit(eqxreg.bake)(wrapped, state)
    assert dense_norm(plain, shape) == pytest.approx(0.7, rel=1e-2)


def test_the_gradient_of_the_operator_norm_matches_finite_differences(key):
    conv = eqx.nn.Conv1d(2, 3, 3, padding=1, key=key)

    def norm(weight):
        layer = eqx.tree_at(lambda c: c.weight, conv, weight)
        return eqxreg.operator_norm(layer, (2, 8))

    direction = sample("float32", shape=conv.weight.shape)
    slope = jax.jvp(norm, (conv.weight,), (direction,))[1]
    step = 1e-2 * direction
    difference = (norm(conv.weight + step) - norm(conv.weight - step)) / 2e-2
    np.testing.assert_allclose(slope, difference, rtol=1e-2)


def test_the_first_call_is_as_good_as_the_others(key):
    linear = eqx.nn.Linear(64, 48, key=key)
    wrapped, state = wrap(linear)
    _, state = wrapped(jnp.ones(64), state)
    weight = eqxreg.bake(wrapped, state).weight
    assert largest(weight) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("input_shape", [None, (3, 8, 8)])
def test_training_keeps_the_norm(input_shape, key):
    """A hundred steps of Adam. What is measured is what each step computed with."""
    conv = eqx.nn.Conv2d(3, 8, 3, padding=1, key=key)
    model, state = wrap(conv, input_shape=input_shape)
    inputs = jax.random.normal(key, (16, 3, 8, 8))
    targets = jax.random.normal(jax.random.key(1), (16, 8, 8, 8))
    optimiser = optax.adam(1e-3)
    opt_state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))

    @filter_jit
    def step(model, state, opt_state):
        def loss(model, state):
            batched = jax.vmap(model, (0, None), (0, None), axis_name="batch")
            out, state = batched(inputs, state)
            return jnp.mean((out - targets) ** 2), state

        value_and_grad = eqx.filter_value_and_grad(loss, has_aux=True)
        (value, state), grads = value_and_grad(model, state)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), state, opt_state, value

    # A unit of every input is given to the layer: its dense matrix, bias aside.
    shape = (3, 8, 8)
    units = jnp.eye(3 * 64).reshape(-1, *shape)

    @filter_jit
    def matrix(model, state):
        out = jax.vmap(lambda x: model(x, state)[0])(
            jnp.concatenate([units, 0 * units[:1]])
        )
        return (out[:-1] - out[-1:]).reshape(len(units), -1)

    values = []
    for i in range(100):
        if i % 10 == 9 or i == 0:
            if input_shape is None:
                raw = model.weight
                ratio = eqxreg.bake(model, state).weight / raw
                norm = largest(raw) * float(np.median(ratio))
            else:
                norm = np.linalg.svd(exact(matrix(model, state)), compute_uv=False)[0]
            assert norm == pytest.approx(1.0, rel=1e-2), i
        model, state, opt_state, value = step(model, state, opt_state)
        values.append(float(value))
    assert values[-1] < values[0]
    assert jnp.max(jnp.abs(model.weight - conv.weight)) > 0.02


def test_a_direction_that_overtakes_unseen_is_found():
    linear = eqx.nn.Linear(32, 32, use_bias=False, key=jax.random.key(0))
    diagonal = jnp.full(32, 0.1).at[0].set(1.0)
    put = lambda layer, d: eqx.tree_at(lambda n: n.weight, layer, jnp.diag(d))
    model, state = wrap(put(linear, diagonal))
    call = filter_jit(lambda model, x, state: model(x, state))
    # Power iteration alone, locked to the first axis, would need dozens of steps.
    grown = eqx.tree_at(lambda m: m.layer, model, put(linear, diagonal.at[5].set(1.2)))
    for _ in range(4):
        _, state = call(grown, jnp.ones(32), state)
    assert largest(eqxreg.bake(grown, state).weight) == pytest.approx(1.0, rel=1e-2)


def test_inference_leaves_the_vectors_as_they_are(key):
    model, state = wrap(eqx.nn.Linear(6, 5, key=key))
    moved = eqx.tree_at(
        lambda m: m.layer.weight, model, sample("float32", shape=(5, 6))
    )
    frozen = eqx.nn.inference_mode(moved)
    assert frozen.inference and not moved.inference
    before = jax.tree.leaves(clone(state))
    out, after = frozen(jnp.ones(6), clone(state))
    assert all(map(jnp.array_equal, before, jax.tree.leaves(after)))
    _, trained = moved(jnp.ones(6), clone(state))
    assert not all(map(jnp.array_equal, before, jax.tree.leaves(trained)))
    baked = eqxreg.bake(moved, state)
    assert_close(baked(jnp.ones(6)), out)
    # The argument of a call takes precedence.
    again, _ = moved(jnp.ones(6), clone(state), inference=True)
    assert jnp.array_equal(again, out)


def test_the_gradient_is_that_of_miyato_and_others():
    weight = sample("float32", shape=(5, 7))
    linear = eqx.nn.Linear(7, 5, use_bias=False, key=jax.random.key(0))
    model, state = wrap(eqx.tree_at(lambda n: n.weight, linear, weight), norm=2.0)
    x, y = sample("float32", shape=(7,)), sample("float32", shape=(5,), seed=1)
    loss = lambda model: jnp.dot(y, model(x, clone(state))[0])
    gradient = eqx.filter_grad(loss)(model).weight
    u, s, vh = np.linalg.svd(exact(weight))
    outer = np.outer(exact(y), exact(x))
    inner = (outer * exact(weight)).sum() / s[0]
    expected = 2 / s[0] * (outer - inner * np.outer(u[:, 0], vh[0]))
    assert_close(gradient, expected)


@pytest.mark.parametrize("input_shape", [None, (2, 6)])
def test_a_zero_weight_stays_zero_and_recovers(input_shape, key):
    conv = eqx.nn.Conv1d(2, 3, 3, padding=1, use_bias=False, key=key)
    zero = eqx.tree_at(lambda n: n.weight, conv, jnp.zeros_like(conv.weight))
    model, state = wrap(zero, input_shape=input_shape)
    loss = lambda model: jnp.sum(model(jnp.ones((2, 6)), clone(state))[0])
    value, gradient = eqx.filter_value_and_grad(loss)(model)
    assert value == 0 and jnp.all(jnp.isfinite(gradient.weight))
    assert jnp.any(gradient.weight != 0)
    for _ in range(2):
        _, state = model(jnp.ones((2, 6)), state)
    revived = eqx.tree_at(lambda m: m.layer, model, conv)
    for _ in range(3):
        out, state = revived(jnp.ones((2, 6)), state)
    assert jnp.all(jnp.isfinite(out))


def test_recurrent_cells_and_attention_have_blocks_and_names(key):
    cell = eqx.nn.GRUCell(4, 6, key=key)
    wrapped, state = wrap(cell, ("weight_ih", "weight_hh"), blocks=3)
    _, state = wrapped(jnp.ones(4), jnp.ones(6), state)
    baked = eqxreg.bake(wrapped, state)
    for weight in (baked.weight_ih, baked.weight_hh):
        tops = [largest(block) for block in jnp.split(weight, 3)]
        np.testing.assert_allclose(tops, 1.0, rtol=1e-3)
    attention = eqx.nn.MultiheadAttention(2, 4, dropout_p=0.5, key=key)
    wrapped, state = wrap(attention, "query_proj.weight")
    x = jnp.ones((3, 4))
    out, _ = wrapped(x, x, x, state=state, key=key)
    assert out.shape == (3, 4)


def test_it_composes_with_our_wrappers_and_with_equinox(key):
    x = jnp.ones(6)

    def ours(layer):
        return eqxreg.SpectralNormConstraint(layer, key=key)

    def equinox(layer):
        return eqx.nn.SpectralNorm(layer, "weight", key=key)

    def rows(layer):
        return eqxreg.MaxNormConstraint(layer, "weight", 0.1, axis="unit")

    def cap(layer):
        return eqxreg.SpectralCapConstraint(layer, cap=0.5)

    linear = eqx.nn.Linear(6, 5, key=key)

    def weight_of(*wrappers):
        def build():
            layer = linear
            for wrapper in wrappers:
                layer = wrapper(layer)
            return layer

        model, state = eqx.nn.make_with_state(build)()
        call = filter_jit(lambda model, x, state: model(x, state))
        for _ in range(3):
            _, state = call(model, x, state)
        return exact(filter_jit(eqxreg.bake)(model, state).weight)

    # The outermost promise holds.
    for inner in (rows, equinox):
        assert largest(weight_of(inner, ours)) == pytest.approx(1.0, rel=1e-2)
    assert np.all(np.linalg.norm(weight_of(ours, rows), axis=1) <= 0.1)
    assert largest(weight_of(equinox, cap)) <= 0.5
    # Around ours, Equinox's rewrites the raw weight; then the inner one holds last.
    assert np.all(np.linalg.norm(weight_of(rows, equinox), axis=1) <= 0.1)
    assert largest(weight_of(ours, equinox)) == pytest.approx(1.0, rel=1e-2)


def test_a_stack_has_vectors_for_each_layer():
    keys = jax.random.split(jax.random.key(0), 3)
    layers = eqx.filter_vmap(lambda k: eqx.nn.Linear(4, 6, key=k))(keys)
    model, state = wrap(layers)
    weights = eqxreg.bake(model, state).weight
    np.testing.assert_allclose([largest(w) for w in weights], 1.0, rtol=1e-3)


def test_the_state_free_map_goes_anywhere(key):
    p = eqxreg.SpectralNorm()
    mlp = eqxreg.constrain(eqx.nn.MLP(4, 2, 8, depth=2, key=key), p)
    assert jnp.all(jnp.isfinite(filter_jit(mlp)(jnp.ones(4))))
    for layer in eqxreg.bake(mlp).layers:
        assert largest(layer.weight) == pytest.approx(1.0, rel=1e-3)
    cell = eqx.nn.LSTMCell(4, 3, key=key)
    cell = eqxreg.Constraint(cell, "weight_hh", eqxreg.SpectralNorm(blocks=4))
    zeros = (jnp.zeros(3), jnp.zeros(3))
    scan = lambda xs: jax.lax.scan(lambda h, x: (cell(x, h), None), zeros, xs)[0]
    gradient = jit(jax.grad(lambda xs: jnp.sum(scan(xs)[0])))(jnp.ones((5, 4)))
    assert jnp.all(jnp.isfinite(gradient))


MISTAKES = [
    ({"num_power_iterations": 0}, "`num_power_iterations` must be a positive int"),
    ({"input_shape": (3,)}, "is no input of this Conv1d"),
    ({"input_shape": ()}, "`input_shape` must be the full shape"),
    ({"input_shape": (2, 8), "blocks": 3}, "has no meaning for the norm"),
    ({"norm": -1.0}, "`norm` must be positive"),
]


@pytest.mark.parametrize("kwargs, message", MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_are_named(kwargs, message, key):
    conv = eqx.nn.Conv1d(2, 3, 3, key=key)
    with pytest.raises(ValueError, match=message):
        wrap(conv, **kwargs)


def test_a_norm_of_an_operator_needs_a_size_and_a_linear_layer(key):
    with pytest.raises(ValueError, match="needs `input_shape`"):
        eqxreg.operator_norm(eqx.nn.Conv1d(2, 3, 3, key=key))
    with pytest.raises(TypeError, match="use `eqxreg.lipschitz_bound`"):
        eqxreg.operator_norm(eqx.nn.GRUCell(2, 3, key=key))
    linear = eqxreg.MaxNormConstraint(eqx.nn.Linear(3, 4, key=key), "weight", 0.5)
    expected = largest(eqxreg.bake(linear).weight)
    assert float(eqxreg.operator_norm(linear)) == pytest.approx(expected, rel=1e-5)


def test_a_new_state_can_be_donated(key):
    build = eqx.nn.make_with_state(eqxreg.SpectralNormConstraint)
    layer, state = build(eqx.nn.Linear(4, 4, key=key), "weight", key=key)
    call = lambda layer, state: layer(jnp.ones(4), state)
    expected, _ = call(layer, jax.tree.map(jnp.copy, state))
    out, _ = eqx.filter_jit(call, donate="all")(layer, state)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
