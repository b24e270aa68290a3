"""What a map holds is a constant: no gradient reaches it and no optimiser moves it, and
yet it is data, that can be replaced without a new trace."""

import pickle
from typing import ClassVar

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree


# Of Optax's optimisers few are clean under strict promotion.
pytestmark = pytest.mark.usefixtures("standard_promotion")

X = jnp.linspace(-1.0, 1.0, 4)


class Scaled(eqxreg.Parametrization):
    """A map of a user, with an array and a number of its own."""

    scale: jax.Array
    offset: float = 0.0

    def __call__(self, raw):
        assert isinstance(self.scale, jax.Array)
        return raw * self.scale + self.offset

    def inverse(self, weight):
        return (weight - self.offset) / self.scale


class Gained(Scaled):
    """One that trains what the other one holds."""

    trained: ClassVar[tuple[str, ...]] = ("scale",)


class Hyper(eqxreg.Parametrization):
    """One with a network within, and one with a map within."""

    net: eqx.nn.Linear
    inner: tuple[Scaled, dict[str, jax.Array]]

    def __call__(self, raw):
        return self.inner[0](raw) + self.net(jnp.ones(4, raw.dtype))[:, None]

    def inverse(self, weight):
        return self.inner[0].inverse(weight - self.net(jnp.ones(4))[:, None])


MAPS = {
    "max_norm": eqxreg.MaxNorm(jnp.asarray(0.7), axis="unit"),
    "unit_norm": eqxreg.UnitNorm(jnp.asarray(0.7)),
    "box": eqxreg.Box(jnp.asarray(-0.1), jnp.asarray(0.2)),
    "spectral_norm": eqxreg.SpectralNorm(jnp.asarray(0.7)),
    "cayley": eqxreg.Cayley(),
    "matrix_exp": eqxreg.MatrixExp(),
    "relative": eqxreg.Relative(eqxreg.MaxNorm(jnp.asarray(1.5), axis="unit")),
    "chain": eqxreg.Chain(eqxreg.Interval(-9.0, jnp.asarray(9.0)), eqxreg.Symmetric()),
    "straight_through": eqxreg.StraightThrough(eqxreg.MaxNorm(jnp.asarray(0.7))),
    "own": Scaled(jnp.linspace(0.5, 2.0, 4)[None]),
    "own_in_chain": eqxreg.Chain(
        Scaled(jnp.full((4, 1), 2.0)), Scaled(jnp.ones((1, 4)))
    ),
}


def moved(tree, steps=50):
    """After decay and momentum without a mask, with gradients that are zero."""
    optimiser = optax.adamw(1e-2, weight_decay=0.1)
    params, static = eqx.partition(tree, eqx.is_inexact_array)
    state = optimiser.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for _ in range(steps):
        updates, state = optimiser.update(zeros, state, params)
        params = optax.apply_updates(params, updates)
    return eqx.combine(params, static)


def maps_of(layer):
    return jax.tree.map(np.asarray, layer.parametrizations)


@pytest.mark.parametrize("name", MAPS)
def test_nothing_that_a_map_holds_moves(name, key):
    layer = eqxreg.Constraint(eqx.nn.Linear(4, 4, key=key), "weight", MAPS[name])
    params = eqx.filter(layer, eqx.is_inexact_array)
    assert jax.tree.leaves(params.parametrizations) == []
    grads = eqx.filter_grad(lambda m: jnp.sum(m(X) ** 2))(layer)
    assert jax.tree.leaves(grads.parametrizations) == []
    after = moved(layer)
    for old, new in zip(
        jax.tree.leaves(maps_of(layer)), jax.tree.leaves(maps_of(after)), strict=True
    ):
        np.testing.assert_array_equal(new, old)
    assert not jnp.array_equal(after.layer.weight, layer.layer.weight) or (
        name in ("cayley", "matrix_exp")  # whose raw weight is zero
    )


@pytest.mark.parametrize("name", MAPS)
def test_nothing_moves_in_a_module_that_holds_a_map_itself(name):
    if not name.startswith("own"):
        p = MAPS[name]
        assert jax.tree.leaves(eqx.filter({"map": p}, eqx.is_inexact_array)) == []


def test_bounds_read_as_floats(key):
    layer = eqxreg.MaxNormConstraint(
        eqx.nn.Linear(4, 4, key=key), "weight", jnp.asarray(1.0)
    )
    layer = moved(layer, steps=300)
    bound = layer.max_norm
    assert float(bound) == 1.0 and bound == 1.0 and bool(bound < 2.0)
    assert bound.dtype == jnp.float32 and bound.shape == () and bound.ndim == 0
    assert jnp.asarray(bound).dtype == jnp.float32
    assert np.asarray(bound) == 1.0
    assert 2 * bound == 2.0 and bound / 2 == 0.5 and 1 - bound == 0 and -bound == -1
    np.testing.assert_allclose(bound, 1.0)
    assert jnp.allclose(bound, 1.0) and bound == pytest.approx(1.0)
    assert f"{bound:.2f}" == "1.00" and str(bound) == "1.0" and round(bound, 2) == 1.0
    assert bound.item() == 1.0 and int(bound) == 1
    p = eqxreg.SpectralNorm(jnp.array(2.0))
    assert float(p.norm) == 2.0


def test_what_a_map_trains_it_says(key):
    linear = eqx.nn.Linear(4, 4, key=key)
    held = eqxreg.Constraint(linear, "weight", Scaled(jnp.ones((1, 4))))
    trains = eqxreg.Constraint(linear, "weight", Gained(jnp.ones((1, 4))))
    paths = lambda tree: [path for path, _ in eqxreg.trainables(tree, paths=True)]
    assert paths(held) == [".layer.weight", ".layer.bias"]
    assert paths(trains) == [*paths(held), ".parametrizations[0].scale"]
    grads = eqx.filter_grad(lambda m: jnp.sum(m(X) ** 2))(trains)
    assert jnp.any(grads.parametrizations[0].scale != 0)
    gain = eqxreg.WeightNormConstraint(linear)
    assert paths(gain) == [*paths(held), ".parametrizations[0].gain"]


def test_a_chain_trains_what_its_parts_train(key):
    chain = eqxreg.Chain(Scaled(jnp.ones((1, 4))), Gained(jnp.ones((1, 4))))
    layer = eqxreg.Constraint(eqx.nn.Linear(4, 4, key=key), "weight", chain)
    trained = eqx.filter(layer, eqx.is_inexact_array).parametrizations
    assert len(jax.tree.leaves(trained)) == 1


def test_modules_and_containers_in_a_map_are_constants_too(key):
    p = Hyper(
        eqx.nn.Linear(4, 4, key=key), (Scaled(jnp.ones((1, 4))), {"a": jnp.ones(2)})
    )
    linear = eqx.nn.Linear(4, 4, key=key)
    layer = eqxreg.Constraint(linear, "weight", p)
    assert len(eqxreg.trainables(layer)) == 2
    np.testing.assert_allclose(layer(X), linear(X), rtol=1e-5)


@pytest.mark.parametrize("name", MAPS)
def test_a_new_value_is_no_new_program(name, key):
    traces = 0

    @eqx.filter_jit
    def call(layer):
        nonlocal traces
        traces += 1
        return layer(X)

    p = MAPS[name]
    twice = jax.tree.map(
        lambda x: type(x).of(2 * x.value) if hasattr(x, "parts") else 2 * x,
        p,
        is_leaf=lambda x: hasattr(x, "parts"),
    )
    linear = eqx.nn.Linear(4, 4, key=key)
    outputs = [call(eqxreg.Constraint(linear, "weight", q)) for q in (p, twice)]
    assert traces == 1 and jnp.all(jnp.isfinite(jnp.stack(outputs)))


def test_tree_at_puts_a_constant_there(key):
    linear = eqx.nn.Linear(4, 4, key=key)
    layer = eqxreg.Constraint(linear, "weight", MAPS["max_norm"])
    for where in (
        lambda m: m.parametrization.max_norm,
        lambda m: m.parametrizations[0].max_norm,
    ):
        new = eqx.tree_at(where, layer, jnp.asarray(0.3))
        assert jax.tree.structure(new) == jax.tree.structure(layer)
        assert moved(new).parametrization.max_norm == np.float32(0.3)
    traced = jax.jit(lambda b: eqx.tree_at(where, layer, b)(X))(jnp.asarray(0.3))
    np.testing.assert_allclose(traced, new(X), rtol=1e-6)
    gradient = jax.grad(lambda b: eqx.tree_at(where, layer, b)(X).sum())(0.3)
    assert gradient == 0


def test_constants_are_stacked_sharded_and_saved(key, tmp_path):
    def build(key):
        linear = eqx.nn.Linear(4, 4, key=key)
        inner = eqxreg.Constraint(linear, "weight", eqxreg.Cayley())
        return eqxreg.Constraint(inner, "weight", Scaled(jnp.asarray(0.5)))

    keys = jax.random.split(key, 4)
    layers = [build(k) for k in keys]
    stack = eqx.filter_vmap(build)(keys)
    out = eqx.filter_vmap(lambda m: m(X))(stack)
    np.testing.assert_allclose(out, jnp.stack([m(X) for m in layers]), rtol=1e-5)
    params, static = eqx.partition(stack, eqx.is_array)
    _, scanned = jax.lax.scan(
        lambda _, p: (None, eqx.combine(p, static)(X)), None, params
    )
    np.testing.assert_allclose(scanned, out, rtol=1e-5)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    placed = eqx.filter_shard(stack, sharding)
    np.testing.assert_allclose(eqx.filter_vmap(lambda m: m(X))(placed), out, rtol=1e-5)
    eqx.tree_serialise_leaves(tmp_path / "layer", layers[0])
    loaded = eqx.tree_deserialise_leaves(tmp_path / "layer", layers[1])
    assert jnp.array_equal(loaded(X), layers[0](X))
    assert jnp.array_equal(pickle.loads(pickle.dumps(layers[0]))(X), layers[0](X))


def test_a_bound_that_many_layers_share_can_be_donated(key):
    mlp = eqx.nn.MLP(4, 2, 8, depth=2, key=key)
    model = eqxreg.constrain(mlp, eqxreg.MaxNorm(jnp.asarray(0.3), axis="unit"))
    cell = eqx.nn.GRUCell(4, 3, key=key)
    cell = eqxreg.constrain(cell, eqxreg.Box(jnp.asarray(-0.1), jnp.asarray(0.1)))
    expected = model(X)
    both = (model, cell)
    step = eqx.filter_jit(lambda m: (m[0](X), m), donate="all")
    out, _ = step(both)
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_averages_of_constants_are_constants_or_an_error(key):
    layer = eqxreg.Constraint(eqx.nn.Linear(4, 4, key=key), "weight", eqxreg.Cayley())
    params, static = eqx.partition(layer, eqx.is_inexact_array)
    mean = optax.incremental_update(params, params, 0.25)
    assert jnp.array_equal(eqx.combine(mean, static)(X), layer(X))
    params, static = eqx.partition(layer, eqx.is_array)
    flat, unravel = ravel_pytree(params)
    assert eqx.tree_equal(eqx.combine(unravel(flat), static), layer)
    mean = optax.incremental_update(params, params, 0.25)
    with pytest.raises(ValueError, match=r"constant.*is_inexact_array"):
        eqx.combine(mean, static)(X)


def test_an_initial_norm_that_is_given_stays_when_a_weight_is_bound():
    p = eqxreg.Relative(eqxreg.MaxNorm(1.5), sizes=2.0)
    bound, _ = p.bind(jnp.array([30.0, 40.0]))
    np.testing.assert_allclose(bound(jnp.array([30.0, 40.0])), [1.8, 2.4], rtol=1e-5)
