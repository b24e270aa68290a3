"""In inference and in `bake`, what a state holds is where the search for the largest
singular value starts, and no more: whatever it is, the bound is kept. What comes out is
measured by singular values in float64, that of convolutions on dense Jacobians."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import filter_jit, jit
from tables import clone, exact, wrap


pytestmark = pytest.mark.usefixtures("quick_compilation")


def with_vectors(fn, *states):
    """A state whose vectors are made of those of some states."""
    make = lambda x, *xs: fn(x, *xs) if eqx.is_inexact_array(x) else x
    return jax.tree.map(make, *map(clone, states))


def norms(weight, blocks=1):
    return [np.linalg.norm(m, 2) for m in np.split(exact(weight), blocks)]


def dense(layer, shape):
    """The matrix of a layer without bias."""
    units = jnp.eye(int(np.prod(shape))).reshape(-1, *shape)
    return exact(jax.vmap(layer)(units)).reshape(len(units), -1).T


def linear(size_in, size_out, key):
    return eqx.nn.Linear(size_in, size_out, use_bias=False, key=key)


LAYERS = {
    "square": (lambda k: linear(24, 24, k), {}, lambda m: norms(m.weight)),
    "wide": (lambda k: linear(40, 12, k), {}, lambda m: norms(m.weight)),
    "tall": (lambda k: linear(12, 40, k), {}, lambda m: norms(m.weight)),
    "blocks": (
        lambda k: eqx.nn.GRUCell(4, 12, key=k),
        {"weight_name": "weight_hh", "blocks": 3},
        lambda m: norms(m.weight_hh, 3),
    ),
    "stack": (
        lambda k: eqx.filter_vmap(lambda k: linear(10, 8, k))(jax.random.split(k, 3)),
        {},
        lambda m: [np.linalg.norm(exact(w), 2) for w in m.weight],
    ),
    "operator": (
        lambda k: eqx.nn.Conv2d(2, 3, 3, padding=1, use_bias=False, key=k),
        {"input_shape": (2, 9, 9)},
        lambda m: [np.linalg.norm(dense(m, (2, 9, 9)), 2)],
    ),
    "circular operator": (
        lambda k: eqx.nn.Conv1d(
            2, 2, 5, padding=2, padding_mode="CIRCULAR", use_bias=False, key=k
        ),
        {"input_shape": (2, 60)},
        lambda m: [np.linalg.norm(dense(m, (2, 60)), 2)],
    ),
}


def raw_of(model):
    return jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))


@pytest.mark.parametrize("name", list(LAYERS))
def test_the_bound_is_kept_whatever_the_state_holds(name):
    build, options, norms_of = LAYERS[name]
    model, state = wrap(build(jax.random.key(0)), **options)
    other, others = wrap(build(jax.random.key(1)), **options)
    noise = lambda x: jax.random.normal(jax.random.key(2), x.shape, x.dtype)
    states = {
        "own": state,
        "of another weight": others,
        "average": with_vectors(lambda x, y: (x + y) / 2, state, others),
        "moved": with_vectors(lambda x: x + 0.01 * noise(x), state),
        "zeros": with_vectors(jnp.zeros_like, state),
        "NaN": with_vectors(lambda x: jnp.full_like(x, jnp.nan), state),
        "large": with_vectors(lambda x: 1e30 * x, state),
    }
    bake = filter_jit(eqxreg.bake)
    for kind, starts in states.items():
        baked = bake(model, clone(starts))
        np.testing.assert_allclose(norms_of(baked), 1.0, rtol=1e-3, err_msg=kind)
        again = bake(model, clone(starts))
        assert all(map(jnp.array_equal, raw_of(baked), raw_of(again)))
    # A raw weight that has jumped, such as a loaded one, with the state of before.
    baked = bake(eqx.tree_at(lambda m: m.layer, model, other.layer), clone(state))
    np.testing.assert_allclose(norms_of(baked), 1.0, rtol=1e-3)


@pytest.mark.parametrize("by", [1.002, 1.01, 1.05, 1.2, 5.0])
def test_a_direction_that_has_overtaken_is_seen_in_inference(by, key):
    sizes = jnp.linspace(0.5, 0.1, 24).at[0].set(1.0)
    put = lambda layer, s: eqx.tree_at(lambda n: n.weight, layer, jnp.diag(s))
    plain = linear(24, 24, key)
    model, state = wrap(put(plain, sizes))
    for i in (3, 23):
        risen = put(plain, sizes.at[i].set(by))
        moved = eqx.tree_at(lambda m: m.layer, model, risen)
        baked = filter_jit(eqxreg.bake)(moved, clone(state))
        np.testing.assert_allclose(norms(baked.weight), 1.0, rtol=1e-3)


@pytest.mark.parametrize("name", ["square", "blocks", "operator"])
def test_inference_and_bake_agree_and_leave_the_state(name):
    build, options, _ = LAYERS[name]
    model, state = wrap(build(jax.random.key(0)), **options)
    move = lambda x: x + 0.1 * jnp.sin(7 * x) if eqx.is_inexact_array(x) else x
    moved = jax.tree.map(move, model)
    before = jax.tree.leaves(clone(state))
    inputs = {"square": [24], "blocks": [4, 12], "operator": [(2, 9, 9)]}[name]
    xs = [jnp.ones(shape) for shape in inputs]
    call = filter_jit(lambda model, state: model(*xs, state=state))
    quiet = eqx.nn.inference_mode(moved)
    out, after = call(quiet, clone(state))
    assert all(map(jnp.array_equal, before, jax.tree.leaves(after)))
    again, _ = call(quiet, clone(state))
    assert jnp.array_equal(out, again)
    baked = filter_jit(eqxreg.bake)(moved, clone(state))
    np.testing.assert_allclose(baked(*xs), out, rtol=1e-4, atol=1e-5)
    # Whatever the flag, `bake` is the same.
    other = filter_jit(eqxreg.bake)(quiet, clone(state))
    assert all(map(jnp.array_equal, raw_of(baked), raw_of(other)))


@pytest.mark.usefixtures("standard_promotion")
def test_baked_at_the_top_of_a_loss_with_the_state_of_the_start(key):
    cell, state = wrap(eqx.nn.GRUCell(3, 8, key=key), "weight_hh", blocks=3)
    optimiser = optax.adam(1e-2)
    moments = optimiser.init(eqx.filter(cell, eqx.is_inexact_array))
    xs = jax.random.normal(jax.random.key(1), (10, 3))
    targets = 3 * jnp.sin(jnp.arange(8.0))

    @filter_jit
    def step(cell, moments):
        def loss(cell):
            plain = eqxreg.bake(cell, clone(state))
            h, _ = jax.lax.scan(lambda h, x: (plain(x, h), None), jnp.zeros(8), xs)
            return jnp.sum((h - targets) ** 2), plain.weight_hh

        grads, weight = eqx.filter_grad(loss, has_aux=True)(cell)
        params = eqx.filter(cell, eqx.is_inexact_array)
        updates, moments = optimiser.update(grads, moments, params)
        return eqx.apply_updates(cell, updates), moments, weight

    first = cell.weight_hh
    for _ in range(100):
        cell, moments, weight = step(cell, moments)
        np.testing.assert_allclose(norms(weight, 3), 1.0, rtol=1e-3)
    # It has been far enough for the vectors of the start to be of no use.
    assert jnp.linalg.norm(cell.weight_hh - first) > jnp.linalg.norm(first)


class Net(eqx.Module):
    layers: list

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        sizes = [(4, 32), (32, 32), (32, 32), (32, 2)]
        self.layers = [
            eqxreg.SpectralNormConstraint(eqx.nn.Linear(*size, key=k), key=k)
            for size, k in zip(sizes, keys, strict=True)
        ]

    def __call__(self, x, state):
        for i, layer in enumerate(self.layers):
            x, state = layer(jax.nn.relu(x) if i else x, state)
        return x, state


@pytest.mark.usefixtures("standard_promotion")
def test_a_trained_network_and_an_average_keep_the_bound_in_inference(key):
    model, state = eqx.nn.make_with_state(Net)(key)
    optimiser = optax.adam(1e-2)
    moments = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    xs = jax.random.normal(jax.random.key(1), (32, 4))
    ys = 5 * jnp.stack([xs[:, 0] * xs[:, 1], xs[:, 2]], 1)

    @filter_jit
    def step(model, state, moments):
        def loss(model):
            batched = jax.vmap(model, (0, None), (0, None))
            out, new = batched(xs, state)
            return jnp.mean((out - ys) ** 2), new

        grads, new = eqx.filter_grad(loss, has_aux=True)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, moments = optimiser.update(grads, moments, params)
        return eqx.apply_updates(model, updates), new, moments

    averaged = lambda old, new: optax.incremental_update(new, old, 0.02)
    is_number = eqx.is_inexact_array
    average, static = eqx.partition((model, clone(state)), is_number)
    for _ in range(150):
        model, state, moments = step(model, state, moments)
        now = eqx.filter((model, clone(state)), is_number)
        average = averaged(average, now)
    both = [(model, state), eqx.combine(average, static)]
    for model, state in both:
        for layer in filter_jit(eqxreg.bake)(model, state).layers:
            np.testing.assert_allclose(norms(layer.weight), 1.0, rtol=1e-3)


@pytest.mark.parametrize("name", ["square", "operator"])
def test_gradients_through_bake_match_finite_differences(name, x64):
    build, options, _ = LAYERS[name]
    model, state = wrap(build(jax.random.key(0)), **options)
    state = with_vectors(jnp.zeros_like, state)

    def value(weight):
        moved = eqx.tree_at(lambda m: m.layer.weight, model, weight)
        return jnp.sum(eqxreg.bake(moved, clone(state)).weight ** 3)

    weight = model.layer.weight
    assert weight.dtype == "float64"
    direction = jnp.sin(jnp.arange(weight.size * 1.0)).reshape(weight.shape)
    gradient = jit(jax.grad(value))(weight)
    size = 1e-4
    value = jit(value)
    rise = value(weight + size * direction) - value(weight - size * direction)
    found = float(jnp.vdot(gradient, direction))
    assert found == pytest.approx(float(rise) / (2 * size), rel=2e-3)


@pytest.mark.parametrize(
    "dtype, tolerance", [("float16", 4e-3), ("bfloat16", 2e-2), ("complex64", 1e-3)]
)
def test_other_dtypes(dtype, tolerance, key):
    plain = eqx.nn.Linear(12, 9, use_bias=False, dtype=jnp.dtype(dtype), key=key)
    model, state = wrap(plain)
    state = with_vectors(jnp.zeros_like, state)
    baked = filter_jit(eqxreg.bake)(model, state)
    assert baked.weight.dtype == dtype
    np.testing.assert_allclose(norms(baked.weight), 1.0, rtol=tolerance)


def test_a_zero_weight_stays_zero_in_inference(key):
    model, state = wrap(linear(5, 4, key))
    zero = eqx.tree_at(lambda m: m.layer.weight, model, jnp.zeros((4, 5)))

    def loss(model):
        return jnp.sum(eqxreg.bake(model, clone(state)).weight)

    value, gradient = eqx.filter_value_and_grad(loss)(zero)
    assert value == 0 and jnp.array_equal(gradient.layer.weight, jnp.ones((4, 5)))
