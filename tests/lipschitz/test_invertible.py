"""Residual networks of contractions: trained, saved, loaded, and inverted."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tables import assert_close, exact


pytestmark = pytest.mark.usefixtures("standard_promotion")

CAP = 0.8


class Block(eqx.Module):
    """`x + g(x)`, which can be inverted if the constant of `g` is below one."""

    branch: eqx.nn.Sequential

    def __init__(self, layers, input_shapes, key):
        kept = []
        for layer, shape in zip(layers, input_shapes, strict=True):
            kept += [
                eqxreg.SpectralScaleConstraint(
                    layer, "weight", CAP, input_shape=shape, key=key
                ),
                eqx.nn.Lambda(jax.nn.elu),
            ]
        # Nothing comes after the last layer.
        self.branch = eqx.nn.Sequential(kept[:-1])

    def __call__(self, x, state):
        y, state = self.branch(x, state)
        return x + y, state


def dense(key):
    first, second, third = jax.random.split(key, 3)
    layers = (
        eqx.nn.Linear(4, 16, key=first),
        eqx.nn.Linear(16, 16, key=second),
        eqx.nn.Linear(16, 4, key=third),
    )
    return Block(layers, (None, None, None), key)


def convolutional(key):
    first, second = jax.random.split(key)
    layers = (
        eqx.nn.Conv2d(2, 4, 3, padding=1, key=first),
        eqx.nn.Conv2d(4, 2, 3, padding=1, key=second),
    )
    return Block(layers, ((2, 6, 6), "any"), key)


NETWORKS = {"dense": (dense, (4,)), "convolutional": (convolutional, (2, 6, 6))}


def trained(block, state, shape, steps=40):
    """A few dozen steps towards a function that is steeper than the bounds allow."""
    optimiser = optax.adam(3e-2)
    opt_state = optimiser.init(eqx.filter(block, eqx.is_inexact_array))
    x = jax.random.normal(jax.random.key(1), (32, *shape))
    y = 3 * x + jnp.sin(3 * x)

    @eqx.filter_jit
    def step(block, state, opt_state):
        def loss(block, state):
            out, state = jax.vmap(block, (0, None), (0, None))(x, state)
            return jnp.mean((out - y) ** 2), state

        gradient = eqx.filter_value_and_grad(loss, has_aux=True)
        (value, state), grads = gradient(block, state)
        params = eqx.filter(block, eqx.is_inexact_array)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return eqx.apply_updates(block, updates), state, opt_state, value

    values = []
    for _ in range(steps):
        block, state, opt_state, value = step(block, state, opt_state)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]
    # The optimiser moves weights after the last vectors were found: once more.
    _, state = eqx.filter_jit(block)(x[0], state)
    return block, state


def inverse(call, y, steps=60):
    """The fixed point of `x = y - g(x)`, of Banach's theorem."""
    x = y
    for _ in range(steps):
        x = x + (y - call(x))
    return x


def norms_of(block, shape):
    """Those of the plain layers, from dense Jacobians."""
    for layer in block.branch.layers[::2]:
        jacobian = jax.jit(jax.jacobian(layer))(jnp.zeros(shape))
        shape = eqx.filter_jit(layer)(jnp.zeros(shape)).shape
        matrix = exact(jacobian).reshape(int(np.prod(shape)), -1)
        yield np.linalg.norm(matrix, 2)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_residual_network_is_trained_saved_loaded_and_inverted(name, key, tmp_path):
    build, shape = NETWORKS[name]
    block, state = eqx.nn.make_with_state(build)(key)
    block, state = trained(block, state, shape)
    path = tmp_path / "block.eqx"
    eqx.tree_serialise_leaves(path, (block, state))
    fresh = eqx.nn.make_with_state(build)(jax.random.key(9))
    loaded, loaded_state = eqx.tree_deserialise_leaves(path, fresh)

    x = jax.random.normal(jax.random.key(2), shape)
    in_inference = eqx.nn.inference_mode(loaded)
    baked = eqxreg.bake(loaded, loaded_state)
    of_original = eqx.filter_jit(eqx.nn.inference_mode(block))
    for model in (in_inference, baked):
        call = eqx.filter_jit(lambda x, model=model: model(x, loaded_state)[0])
        assert_close(call(x), of_original(x, state)[0])
        back = inverse(call, call(x))
        np.testing.assert_allclose(back, x, atol=1e-5)
    # The bounds hold, and were needed.
    norms = list(norms_of(baked, shape))
    assert max(norms) <= CAP * (1 + 1e-2)
    raw = list(norms_of(eqxreg.strip(loaded), shape))
    assert min(raw) > CAP and np.prod(raw) > 1


def test_without_the_bounds_the_iteration_does_not_find_back(key):
    block, state = eqx.nn.make_with_state(dense)(key)
    block, state = trained(block, state, (4,))
    x = jax.random.normal(jax.random.key(2), (4,))
    free = eqxreg.strip(block)
    call = eqx.filter_jit(lambda x: free(x, state)[0])
    assert not jnp.allclose(inverse(call, call(x)), x, atol=1e-2)


class Features(eqx.Module):
    """Residual features as in SNGP, whose branches start at zero."""

    blocks: list

    def __init__(self, key):
        layers = [eqx.nn.Linear(6, 6, key=k) for k in jax.random.split(key, 3)]
        zero = lambda x: jnp.zeros_like(x)
        self.blocks = [
            eqxreg.SpectralScaleConstraint(jax.tree.map(zero, m), cap=0.9, key=key)
            for m in layers
        ]

    def __call__(self, x, state):
        for block in self.blocks:
            y, state = block(x, state)
            x = x + jax.nn.relu(y)
        return x, state


def test_distances_are_kept_from_the_start_of_training_on(key):
    """Between the products of `1 - cap` and `1 + cap` over the blocks, and at the start
    exactly."""
    model, state = eqx.nn.make_with_state(Features)(key)
    x = jax.random.normal(key, (20, 6))
    call = eqx.filter_jit(
        lambda model, state: jax.vmap(model, (0, None), (0, None))(x, state)
    )
    out, state = call(model, state)
    assert jnp.array_equal(out, x)
    step = lambda w: w + 1e-6 * jax.random.normal(key, w.shape)
    moved = jax.tree.map(
        lambda w: step(w) if eqx.is_inexact_array(w) else w,
        model,
        is_leaf=lambda node: isinstance(node, eqx.nn.StateIndex),
    )
    for _ in range(3):
        out, state = call(moved, state)
        np.testing.assert_allclose(out, x, atol=1e-4)
    grown = jax.tree.map(
        lambda w: 1e6 * w if eqx.is_inexact_array(w) else w,
        moved,
        is_leaf=lambda node: isinstance(node, eqx.nn.StateIndex),
    )
    for _ in range(3):
        out, state = call(grown, state)
    before = np.linalg.norm(exact(x)[:, None] - exact(x), axis=-1)
    after = np.linalg.norm(exact(out)[:, None] - exact(out), axis=-1)
    apart = before > 0
    ratio = after[apart] / before[apart]
    assert 0.09**3 < ratio.min() and ratio.max() < 1.91**3
    assert ratio.max() > 1.2
