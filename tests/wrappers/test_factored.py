"""Layers that only multiply with their weight: the product is scaled in its place, and
nothing of it shows but the cost."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqxreg._maps import _factored
from hlo import counts_of_today, program_of
from quick import filter_jit
from tables import assert_close, exact, sample


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch):
    monkeypatch.setattr(_factored, "MANY_COLUMNS", 1)


UNIT = {"axis": "unit"}
KEY = jax.random.key(1)
X = jnp.linspace(-1.0, 1.0, 4)
HIDDEN = jnp.linspace(0.5, -1.0, 3)

MAPS = {
    "max_norm-unit": eqxreg.MaxNorm(0.8, **UNIT),
    "max_norm-whole": eqxreg.MaxNorm(0.8),
    "max_norm-1": eqxreg.MaxNorm(0.8, ord=1, **UNIT),
    "max_norm-columns": eqxreg.MaxNorm(0.8, axis=0),
    "min_max": eqxreg.MinMaxNorm(0.6, 0.9, 0.5, **UNIT),
    "unit_norm": eqxreg.UnitNorm(0.7, **UNIT),
    "spectral": eqxreg.SpectralNorm(),
    "spectral-blocks": eqxreg.SpectralNorm(blocks=3),
    "spectral-columns": eqxreg.SpectralNorm(matrix=1),
    "scale": eqxreg.SpectralScale(0.5),
}
LAYERS = {
    "linear": (eqx.nn.Linear(4, 6, key=KEY), "weight", (X,)),
    "gru": (eqx.nn.GRUCell(4, 3, key=KEY), ("weight_ih", "weight_hh"), (X, HIDDEN)),
    "lstm": (eqx.nn.LSTMCell(4, 3, key=KEY), "weight_ih", (X, (HIDDEN, HIDDEN))),
    "attention": (
        eqx.nn.MultiheadAttention(3, 6, 4, key=KEY),
        ("query_proj.weight", "key_proj.weight"),
        tuple(sample("float32", shape=shape) for shape in ((2, 6), (3, 4), (3, 6))),
    ),
    "mlp": (eqx.nn.MLP(4, 2, 6, depth=2, key=KEY), "layers[1].weight", (X,)),
}


class Baking(eqx.Module):
    """A layer that makes an array of its weight first."""

    layer: eqx.Module

    def __call__(self, *args):
        return eqxreg.bake(self.layer)(*args)


@filter_jit
def out_and_gradient(layer, args):
    def loss(layer, args):
        out = layer(*args)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(out)), out

    grads, out = eqx.filter_grad(loss, has_aux=True)(layer, args)
    return jax.tree.leaves((out, grads))


def assert_as_if_baked(layer, args):
    assert_close(out_and_gradient(layer, args), out_and_gradient(Baking(layer), args))


@pytest.mark.parametrize("name", list(MAPS))
def test_a_call_and_its_gradient_are_those_of_the_baked_layer(name):
    layer, names, args = LAYERS["linear"]
    assert_as_if_baked(eqxreg.Constraint(layer, names, MAPS[name]), args)


@pytest.mark.parametrize("name", list(LAYERS))
def test_so_they_are_for_every_layer_that_multiplies(name):
    layer, names, args = LAYERS[name]
    assert_as_if_baked(eqxreg.UnitNormConstraint(layer, names, **UNIT), args)
    assert_as_if_baked(eqxreg.WeightNormConstraint(layer, names), args)


@pytest.mark.parametrize("inference", [False, True])
def test_so_they_are_with_a_state(inference):
    layer, state = eqx.nn.make_with_state(eqxreg.SpectralNormConstraint)(
        LAYERS["linear"][0], blocks=2, inference=inference, key=KEY
    )

    # A state may be used once; a copy may be used again.
    copy = lambda: jax.tree.map(lambda x: x, state)

    class Stateless(eqx.Module):
        layer: eqx.Module

        def __call__(self, x):
            return self.layer(x, copy())[0]

    class StatelessBaking(Stateless):
        def __call__(self, x):
            return eqxreg.bake(self.layer, copy())(x)

    pairs = (out_and_gradient(c(layer), (X,)) for c in (Stateless, StatelessBaking))
    assert_close(*pairs)


@pytest.mark.parametrize("name", ["max_norm-unit", "unit_norm", "spectral"])
@pytest.mark.parametrize("scale", [1e25, 1e-25, 0.0])
def test_weights_of_any_size_have_the_right_products_and_gradients(name, scale):
    linear = eqx.nn.Linear(4, 6, use_bias=False, key=KEY)
    unscaled = linear.weight
    scaled = eqx.tree_at(lambda m: m.weight, linear, unscaled * scale)
    out, grad = out_and_gradient(eqxreg.Constraint(scaled, "weight", MAPS[name]), (X,))
    # All of these maps only depend on the direction of a weight that is outside.
    if scale == 1e25 or (scale and name != "max_norm-unit"):
        unit = exact(unscaled)
        axis = None if name == "spectral" else 1
        size = np.linalg.norm(unit, 2) if axis is None else None
        size = np.linalg.norm(unit, axis=1, keepdims=True) if size is None else size
        bound = {"spectral": 1.0, "unit_norm": 0.7, "max_norm-unit": 0.8}[name]
        weight = bound * unit / size
        assert_close(out, weight @ exact(X))
        # The gradient has no part along what is scaled as a whole.
        inner = np.sum(exact(grad) * scale * unit, axis=axis)
        size = np.sum(np.abs(exact(grad) * scale * unit), axis=axis)
        assert np.all(size > 1e-3) and np.all(np.abs(inner) <= 1e-4 * size)
    else:
        # Inside, or zero: the layer as it is.
        assert_close([out, grad], out_and_gradient(scaled, (X,)))


def test_inside_the_set_a_product_keeps_its_bits():
    layer, *_ = LAYERS["linear"]
    wrapped = eqxreg.MaxNormConstraint(layer, "weight", 100.0, **UNIT)
    assert jnp.array_equal(wrapped(X), layer(X))


class Tied(eqx.Module):
    """A layer of one's own, which does more with a weight than multiply with it."""

    linear: eqx.nn.Linear

    def __call__(self, x):
        return self.linear.weight.T @ jnp.tanh(self.linear(x))


class Doubled(eqx.nn.Linear):
    """A subclass, which may do anything."""

    def __call__(self, x):
        return (2 * self.weight) @ x


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (Tied(eqx.nn.Linear(4, 6, key=KEY)), "linear.weight"),
        (Doubled(4, 6, key=KEY), "weight"),
    ],
)
def test_layers_of_ones_own_get_an_array(layer, name):
    wrapped = eqxreg.MaxNormConstraint(layer, name, 0.3, **UNIT)
    assert_close(wrapped(X), eqxreg.bake(wrapped)(X))


def test_a_gain_of_zero_is_trained():
    wrapped = eqxreg.WeightNormConstraint(LAYERS["linear"][0])
    gain = wrapped.g.at[2].set(0.0)
    wrapped = eqx.tree_at(lambda m: m.parametrizations[0].gain, wrapped, gain)
    assert_as_if_baked(wrapped, (X,))
    gradient = eqx.filter_grad(lambda m: jnp.sum(m(X)))(wrapped).g
    assert gradient[2] != 0


SIZE = _factored.MANY_COLUMNS


def written(p, size):
    """How many weights of a square layer a call writes to memory."""
    linear = eqx.nn.Linear(size, size, key=KEY)
    params, static = eqx.partition(
        eqxreg.Constraint(linear, "weight", p), eqx.is_inexact_array
    )
    call = lambda params, x: eqx.combine(params, static)(x)
    program = program_of(call, params, jnp.ones(size))
    return program.memory_analysis().temp_size_in_bytes // (4 * size * size)


class HalfOf(eqxreg.MaxNorm):
    """A map of one's own, by a subclass."""

    def __call__(self, raw):
        return super().__call__(raw) / 2


def test_a_subclass_of_a_map_is_called():
    wrapped = eqxreg.Constraint(LAYERS["linear"][0], "weight", HalfOf(0.8, **UNIT))
    assert jnp.all(jnp.linalg.norm(eqxreg.bake(wrapped).weight, axis=1) <= 0.4)
    assert_as_if_baked(wrapped, (X,))


@counts_of_today
@pytest.mark.parametrize(
    ("p", "copies"),
    [(MAPS["max_norm-unit"], 0), (MAPS["spectral"], 0), (eqxreg.Box(-0.01, 0.01), 1)],
    ids=["max_norm", "spectral", "box"],
)
def test_a_call_writes_no_weight_to_memory(p, copies):
    assert written(p, SIZE) == copies


@counts_of_today
def test_a_small_weight_is_written(monkeypatch):
    monkeypatch.setattr(_factored, "MANY_COLUMNS", SIZE)
    assert written(MAPS["max_norm-unit"], SIZE // 2) == 1
    assert written(MAPS["max_norm-unit"], SIZE) == 0
