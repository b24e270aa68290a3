"""Masked weights: the rest is zero, and so is its gradient."""

import re

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from structures import MASK, SHAPE, applied, derivatives
from tables import exact, sample


@pytest.mark.parametrize("mask", [MASK, jnp.asarray(MASK), MASK[:, :1], MASK[0]])
@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
def test_a_mask_zeroes_the_rest_and_its_gradient(mask, dtype):
    weight, p = sample(dtype, shape=SHAPE), eqxreg.Masked(mask)
    expected = np.where(mask, exact(weight), 0)
    assert np.array_equal(exact(applied(p, weight)), expected)
    for change in derivatives(p, weight, weight):
        assert np.array_equal(exact(change), expected)


def test_what_is_not_finite_shows_through_a_mask():
    p = eqxreg.Masked(np.zeros((2, 2), bool))
    result = applied(p, jnp.asarray([[jnp.nan, 1.0], [jnp.inf, -jnp.inf]]))
    np.testing.assert_array_equal(result, [[np.nan, 0.0], [np.inf, -np.inf]])


def test_nothing_trains_a_mask(key):
    layer = eqx.nn.Linear(4, 8, key=key)
    layer = eqxreg.Constraint(layer, "weight", eqxreg.Masked(MASK))
    loss = lambda layer: jnp.sum(layer(jnp.ones(4)))
    gradient = eqx.filter_jit(eqx.filter_grad(loss))(layer)
    assert len(jax.tree.leaves(gradient)) == 2
    assert jnp.array_equal(gradient.layer.weight, MASK.astype("float32"))


def test_a_mask_may_be_traced():
    result = jax.jit(lambda mask, w: eqxreg.Masked(mask)(w))(MASK, jnp.ones(SHAPE))
    assert jnp.array_equal(result, MASK.astype("float32"))


def test_a_mask_acts_on_each_layer_of_a_stack(key):
    masked = lambda layer: eqxreg.Constraint(layer, "weight", eqxreg.Masked(MASK))
    linear = lambda key: eqx.nn.Linear(4, 8, key=key)

    @jax.jit
    def weights(keys):
        stack = eqx.filter_vmap(linear)(keys)
        within = eqx.filter_vmap(lambda key: masked(linear(key)))(keys)
        layers = stack, eqxreg.bake(masked(stack)), eqxreg.bake(within)
        return [layer.weight for layer in layers]

    plain, *constrained = weights(jax.random.split(key, 3))
    for weight in constrained:
        assert np.array_equal(exact(weight), np.where(MASK, exact(plain), 0))


@pytest.mark.parametrize(
    "mask, message",
    [
        (np.ones((2, 2)), "got one of float64: perhaps `mask != 0`"),
        (jnp.ones((2, 2), "int32"), "got one of int32"),
        ([[True]], r"`mask` must be a boolean array, got \[\[True\]\]"),
        (True, "`mask` must be a boolean array, got True"),
    ],
    ids=["float", "int", "list", "bool"],
)
def test_a_mask_is_a_boolean_array(mask, message):
    with pytest.raises(TypeError, match=message):
        eqxreg.Masked(mask)


@pytest.mark.parametrize("shape", [(4, 8), (3, 8, 4), (8,), (8, 5), (0, 4)])
def test_a_mask_fits_its_weight(shape, key):
    p, layer = eqxreg.Masked(np.ones(shape, bool)), eqx.nn.Linear(4, 8, key=key)
    message = (
        "`mask` must have the shape of the weight, (8, 4), or one that broadcasts to "
        f"it, got {shape}."
    )
    for call in (p, lambda w: eqxreg.Constraint(layer, "weight", p)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(layer.weight)
