"""How wrappers compose: with each other and with Equinox's, with and without state."""

import equinox as eqx
import eqxreg
import jax.numpy as jnp
import numpy as np
import pytest
from quick import filter_jit
from tables import assert_close, exact


pytestmark = pytest.mark.usefixtures("quick_compilation")


X = jnp.linspace(-1.0, 1.0, 4)


def unit_norms(weight):
    return np.sqrt((exact(weight) ** 2).sum(1))


def test_the_outermost_promise_holds(linear):
    raw = linear.weight
    a, b = eqxreg.MaxNorm(0.3, axis="unit"), eqxreg.MinMaxNorm(0.5, 0.6, axis="unit")
    for outer, inner in ((a, b), (b, a)):
        wrapped = eqxreg.Constraint(linear, "weight", inner)
        wrapped = eqxreg.Constraint(wrapped, "weight", outer)
        expected = outer(inner(raw))
        assert_close(wrapped(X), expected @ X + linear.bias)
        assert jnp.array_equal(eqxreg.bake(wrapped).weight, expected)


def test_wrapping_in_an_open_map_around_a_wrapper_preserves_the_layer(linear):
    linear = eqx.tree_at(lambda m: m.weight, linear, jnp.abs(linear.weight) + 0.1)
    inner = eqxreg.Constraint(linear, "weight", eqxreg.Interval(-9.0, 9.0))
    outer = eqxreg.Constraint(inner, "weight", eqxreg.Positive())
    assert_close(outer(X), linear(X), 1e-4)


def stateful(make, key):
    return eqx.nn.make_with_state(make)(key)


def spectral(layer, key):
    return eqx.nn.SpectralNorm(layer, "weight", key=key)


def test_equinox_weight_norm_inside(linear):
    wrapped = eqxreg.MaxNormConstraint(eqx.nn.WeightNorm(linear), "weight", 0.3, "unit")
    baked = eqxreg.bake(wrapped)
    assert type(baked) is eqx.nn.Linear
    assert np.all(unit_norms(baked.weight) <= 0.3)
    assert_close(wrapped(X), baked(X))
    assert not wrapped.is_stateful()


def test_equinox_weight_norm_outside(linear):
    inner = eqxreg.MaxNormConstraint(linear, "weight", 0.3, "unit")
    wrapped = eqx.nn.WeightNorm(inner, "weight")
    assert_close(wrapped(X), inner(X))
    assert_close(eqxreg.bake(wrapped)(X), inner(X))


def test_equinox_spectral_norm_inside(key):
    def make(key):
        linear = eqx.nn.Linear(4, 3, key=key)
        return eqxreg.MaxNormConstraint(spectral(linear, key), "weight", 0.3, "unit")

    wrapped, state = stateful(make, key)
    assert wrapped.is_stateful()
    out, new = filter_jit(wrapped)(X, state)
    assert isinstance(new, eqx.nn.State)
    assert out.shape == (3,)
    # In inference the state is frozen, and baking agrees with calling.
    frozen = eqx.nn.inference_mode(wrapped)
    out, same = frozen(X, state=new)
    baked = eqxreg.bake(frozen, same)
    assert type(baked) is eqx.nn.Linear
    assert np.all(unit_norms(baked.weight) <= 0.3)
    assert_close(baked(X), out)


def test_equinox_spectral_norm_advances_its_state_inside(key):
    def make(key):
        return eqxreg.MaxNormConstraint(
            spectral(eqx.nn.Linear(4, 3, key=key), key), "weight", 9.0
        )

    wrapped, state = stateful(make, key)
    plain, plain_state = stateful(
        lambda key: spectral(eqx.nn.Linear(4, 3, key=key), key), key
    )
    for _ in range(2):
        out, state = wrapped(X, state)
        expected, plain_state = plain(X, plain_state)
        assert_close(out, expected)


def test_equinox_spectral_norm_outside(key):
    def make(key):
        inner = eqxreg.MaxNormConstraint(eqx.nn.Linear(4, 3, key=key), "weight", 0.3)
        return spectral(inner, key)

    wrapped, state = stateful(make, key)
    out, state = wrapped(X, state)
    baked = eqxreg.bake(wrapped, state)
    assert np.linalg.norm(exact(baked.weight)) <= 0.3
    assert_close(out, baked(X))


def test_sequential_passes_state_through_us(key):
    def make(key):
        return eqx.nn.Sequential(
            [
                eqxreg.MaxNormConstraint(eqx.nn.Linear(4, 4, key=key), "weight", 1.0),
                eqxreg.MaxNormConstraint(
                    spectral(eqx.nn.Linear(4, 3, key=key), key), "weight", 0.3
                ),
                eqx.nn.Dropout(0.5),
            ]
        )

    model, state = stateful(make, key)
    out, state = filter_jit(model)(X, state, key=key)
    assert out.shape == (3,) and isinstance(state, eqx.nn.State)


def test_sequential_without_state(linear, key):
    wrapped = eqxreg.MaxNormConstraint(linear, "weight", 1.0)
    model = eqx.nn.Sequential([wrapped, eqx.nn.Lambda(jnp.tanh)])
    assert not model.is_stateful()
    assert jnp.array_equal(model(X, key=key), jnp.tanh(wrapped(X)))


def test_wrapping_around_wrapped_parts_preserves_the_layer(linear, key):
    inner = eqxreg.MaxNormConstraint(linear, "weight", 0.1)
    model = eqx.nn.Sequential([inner])
    wrapped = eqxreg.WeightNormConstraint(model, "layers.0.weight")
    assert_close(wrapped(X), model(X))
    attention = eqx.nn.MultiheadAttention(2, 4, key=key)
    attention = eqxreg.constrain(attention, eqxreg.MaxNorm(0.1))
    wrapped = eqxreg.WeightNormConstraint(attention, "query_proj.weight")
    x = jnp.ones((3, 4)).at[0].set(2.0)
    assert_close(wrapped(x, x, x), attention(x, x, x))
