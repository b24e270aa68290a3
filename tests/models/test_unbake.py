"""The way back to a wrapped model, the way out of it, and models wrapped as one."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import exact


pytestmark = pytest.mark.usefixtures("quick_compilation")


X = jnp.linspace(-1.0, 1.0, 4)


def network(seed, positive=False, depth=2, **options):
    key = jax.random.key(seed)
    mlp = eqx.nn.MLP(4, 2, 8, depth, key=key, **options)
    if not positive:
        return mlp
    lift = lambda x: jnp.abs(x) + 0.1 if eqx.is_inexact_array(x) else x
    return jax.tree.map(lift, mlp)


def arrays(model):
    return jax.tree.leaves(eqx.filter(model, eqx.is_array))


MAPS = {
    "max_norm": eqxreg.MaxNorm(0.3, axis="unit"),
    "unit_norm": eqxreg.UnitNorm(0.7),
    "non_negative": eqxreg.NonNegative(),
    "spectral_norm": eqxreg.SpectralNorm(),
    "orthogonal": eqxreg.Orthogonal(),
    "cayley": eqxreg.Cayley(),
    "matrix_exp": eqxreg.MatrixExp(),
    "positive": eqxreg.Positive(),
    "chain": eqxreg.Chain(eqxreg.Interval(-9.0, 9.0), eqxreg.Positive("exp")),
    "traced": eqxreg.MaxNorm(jnp.asarray(0.3)),
    "straight_through": eqxreg.StraightThrough(eqxreg.NonNegative()),
}


@pytest.mark.parametrize("scan", [False, True], ids=["layers", "scanned"])
@pytest.mark.parametrize("name", MAPS)
def test_unbake_is_the_inverse_of_bake(name, scan):
    positive = name in ("positive", "chain")
    build = lambda seed: network(seed, positive, depth=4, scan=scan)
    model = eqxreg.constrain(build(0), MAPS[name])
    plain = eqxreg.bake(eqxreg.constrain(build(1), MAPS[name]))
    back = eqxreg.unbake(model, plain)
    assert jax.tree.structure(back) == jax.tree.structure(model)
    for actual, expected in zip(arrays(eqxreg.bake(back)), arrays(plain), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_unbake_in_half_precision(dtype):
    models = [eqxreg.cast(network(seed), dtype) for seed in (0, 1)]
    model, other = (eqxreg.constrain(m, MAPS["max_norm"]) for m in models)
    plain = eqxreg.bake(other)
    assert eqx.tree_equal(eqxreg.bake(eqxreg.unbake(model, plain)), plain)


def test_nested_wrappers_are_unbaked_outermost_first():
    inner, outer = eqxreg.Positive(), eqxreg.MaxNorm(0.9, axis="unit")
    wrap = lambda model: eqxreg.constrain(eqxreg.constrain(model, inner), outer)
    model, plain = wrap(network(0, True)), eqxreg.bake(wrap(network(1, True)))
    np.testing.assert_allclose(eqxreg.unbake(model, plain)(X), plain(X), rtol=1e-4)


@pytest.mark.parametrize(
    "wrap",
    [eqx.nn.WeightNorm, eqxreg.WeightNormConstraint],
    ids=["eqx.nn.WeightNorm", "WeightNormConstraint"],
)
@pytest.mark.parametrize("where", [None, eqxreg.weights, eqxreg.everything], ids=repr)
def test_gains_and_frozen_arrays_are_set_and_stay_frozen(wrap, where, key):
    model = [wrap(eqx.nn.Linear(4, 3, key=key))]
    model = model if where is None else eqxreg.freeze(model, where)
    plain = [eqx.nn.Linear(4, 3, key=jax.random.key(1))]
    back = eqxreg.unbake(model, plain)
    assert jax.tree.structure(back) == jax.tree.structure(model)
    np.testing.assert_allclose(back[0](X), plain[0](X), rtol=1e-5)


def test_what_is_not_constrained_is_taken_as_it_is(key):
    first = eqxreg.select(where=lambda path, *_: "layers[0]" in path)
    model = eqxreg.constrain(network(0), eqxreg.MaxNorm(9.0), first)
    assert eqx.tree_equal(eqxreg.bake(eqxreg.unbake(model, network(1))), network(1))
    assert eqx.tree_equal(eqxreg.unbake(network(0), network(1)), network(1))
    norm = eqx.nn.BatchNorm(4, "batch", mode="batch")
    model = [eqxreg.MaxNormConstraint(norm, "weight", 9.0), {"step": jnp.asarray(3)}]
    plain = eqxreg.bake(model)
    plain[1] = {"step": jnp.asarray(4)}
    assert eqxreg.unbake(model, plain)[1]["step"] == 4


def test_a_relative_bound_stays_relative_to_the_first_norm(key):
    layer = eqx.nn.Linear(4, 3, key=key)
    p = eqxreg.Relative(eqxreg.MaxNorm(2.0))
    model = eqxreg.constrain([layer], p)
    smaller = jax.tree.map(lambda x: 0.5 * x, [layer])
    [back] = eqxreg.unbake(model, smaller)
    grown = eqx.tree_at(lambda m: m.layer.weight, back, 9 * layer.weight)
    norm = np.linalg.norm(exact(eqxreg.bake(grown).weight))
    np.testing.assert_allclose(norm, 2 * np.linalg.norm(layer.weight), rtol=1e-5)


def test_unbake_is_jittable_and_differentiable():
    model = eqxreg.constrain(network(0, True), eqxreg.Positive())
    plain = network(1, True)

    @eqx.filter_jit
    def out(model, plain):
        return eqxreg.unbake(model, plain)(X)

    np.testing.assert_allclose(out(model, plain), plain(X), rtol=1e-4)
    loss = lambda plain, model: jnp.sum(eqxreg.unbake(model, plain)(X) ** 2)
    grads = eqx.filter_jit(eqx.filter_grad(loss))(plain, model)
    direct = eqx.filter_grad(lambda m: jnp.sum(m(X) ** 2))(plain)
    for actual, expected in zip(arrays(grads), arrays(direct), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


def test_stateful_wrappers_are_unbaked(key):
    build = eqx.nn.make_with_state(eqxreg.SpectralNormConstraint)
    model, state = build(eqx.nn.Linear(4, 4, key=key), key=key)
    other = eqx.nn.Linear(4, 4, key=jax.random.key(1))
    plain = eqxreg.bake(eqxreg.Constraint(other, "weight", eqxreg.SpectralNorm()))
    back = eqxreg.unbake(model, plain)
    np.testing.assert_allclose(back(X), plain(X), rtol=1e-5)
    foreign, _ = eqx.nn.make_with_state(eqx.nn.SpectralNorm)(other, "weight", key=key)
    back = eqxreg.unbake(foreign, plain)
    assert jnp.array_equal(back.layer.weight, plain.weight)


def test_a_weight_outside_of_its_set_is_named():
    model = eqxreg.constrain(network(0), eqxreg.MaxNorm(0.1))
    with pytest.raises(ValueError, match=r"`\.layers\[1\]\.weight`.*distance of"):
        eqxreg.unbake(model, network(1))
    positive = eqxreg.constrain(network(0, True), eqxreg.Positive())
    with pytest.raises(ValueError, match=r"`\.layers\[2\]\.weight`: `Positive` needs"):
        eqxreg.unbake(positive, network(1))
    with pytest.raises(Exception, match=r"`\.layers\[0\]\.weight` a weight outside"):
        eqx.filter_jit(eqxreg.unbake)(model, network(1))


def test_another_model_is_refused():
    model = eqxreg.constrain(network(0), eqxreg.MaxNorm(9.0))
    for other, message in (
        (network(0, depth=3), r"\.layers\[2\]\.weight` it has float32\[8, 8\]"),
        (network(0, use_bias=False), r"\.bias` it has none in the place of float32\["),
        (eqxreg.cast(network(0), "float16"), r"it has float16\[8, 4\] in the place of"),
        (model, r"\.layers\[0\]\.weight` it has none"),
        ({}, r"`plain` must have the arrays of `eqxreg\.bake\(model\)`"),
    ):
        with pytest.raises(ValueError, match=message):
            eqxreg.unbake(model, other)


# Off again


def test_strip_gives_the_raw_weights_in_the_original_types(key):
    mlp = network(0)
    model = eqxreg.constrain(mlp, eqxreg.MaxNorm(0.1))
    model = eqxreg.constrain(model, eqxreg.NonNegative())
    model = eqxreg.freeze(model, eqxreg.biases)
    assert eqx.tree_equal(eqxreg.strip(model), mlp)
    assert eqx.tree_equal(eqxreg.strip(mlp), mlp)
    linear = eqx.nn.Linear(4, 3, key=key)
    spectral = eqx.nn.SpectralNorm(linear, "weight", key=key)
    assert eqxreg.strip([spectral, eqx.nn.WeightNorm(linear)]) == [linear, linear]
    cayley = eqxreg.Constraint(linear, "weight", eqxreg.Cayley())
    assert jnp.all(eqxreg.strip(cayley).weight == 0)
    assert eqx.tree_equal(eqx.filter_jit(eqxreg.strip)(model), mlp)


# Wrapped as one


class Language(eqx.Module):
    embed: eqx.nn.Embedding
    inner: eqx.nn.MLP

    def __init__(self, key):
        self.embed = eqx.nn.Embedding(5, 4, key=key)
        self.inner = eqx.nn.MLP(4, 4, 8, depth=1, key=key)

    def __call__(self, token):
        return self.embed.weight @ self.inner(self.embed(token))

    def logits(self, h):
        return self.embed.weight @ h


def test_in_a_model_wrapped_as_one_every_use_is_of_constrained_weights(key):
    model, token = Language(key), jnp.asarray(2)
    where = eqxreg.weights | eqxreg.embeddings
    p = eqxreg.UnitNorm(0.5, axis="unit")
    whole = eqxreg.constrain(model, p, where, whole=True)
    table = exact(model.embed.weight)
    table = 0.5 * table / np.linalg.norm(table, axis=1, keepdims=True)
    baked = eqxreg.bake(whole)
    np.testing.assert_allclose(baked.embed.weight, table, rtol=1e-5)
    np.testing.assert_allclose(whole(token), baked(token), rtol=1e-6)
    np.testing.assert_allclose(whole.logits(X), table @ exact(X), rtol=1e-4, atol=1e-6)
    # Wrapped layer by layer, the parent reads the raw table.
    layers = eqxreg.constrain(model, p, where)
    assert not np.allclose(layers(token), eqxreg.bake(layers)(token))
    assert eqxreg.trainables(whole, where)[0].shape == (5, 4)
    assert eqx.tree_equal(eqxreg.strip(whole), model)
    assert eqx.tree_equal(eqxreg.unbake(whole, baked)(token), whole(token))


class Physics(eqx.Module):
    raw: dict[str, jax.Array]

    def rhs(self, u):
        return -self.raw["nu"] * u


def test_a_module_that_is_not_called_can_be_wrapped_as_one():
    model = Physics({"nu": jnp.asarray([0.4])})
    nu = eqxreg.select(names="raw.nu")
    model = eqxreg.constrain(model, eqxreg.Positive(), nu, whole=True)
    np.testing.assert_allclose(model.rhs(jnp.ones(1)), [-0.4], rtol=1e-6)
    moved = eqx.tree_at(lambda m: m.raw["nu"], model, jnp.asarray([-0.43]))
    expected = -np.log1p(np.exp(-0.43))
    np.testing.assert_allclose(moved.rhs(jnp.ones(1)), [expected], rtol=1e-5)


def test_a_model_wrapped_as_one_goes_outside_of_its_wrappers(key):
    model = eqxreg.constrain(Language(key), eqxreg.MaxNorm(0.3))
    whole = eqxreg.constrain(model, eqxreg.NonNegative(), whole=True)
    weights = eqxreg.trainables(eqxreg.bake(whole), eqxreg.weights)
    expected = eqxreg.trainables(eqxreg.bake(model), eqxreg.weights)
    for actual, before in zip(weights, expected, strict=True):
        np.testing.assert_allclose(actual, np.maximum(before, 0), rtol=1e-6)


def test_only_a_module_is_wrapped_as_one(key):
    with pytest.raises(TypeError, match=r"`whole=True`.*`eqx\.Module`, got a list"):
        eqxreg.constrain([Language(key)], eqxreg.MaxNorm(1.0), whole=True)
