"""Whole models: constrain, bake, project."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import Own, assert_close, exact


pytestmark = pytest.mark.usefixtures("quick_compilation")


X = jnp.linspace(-1.0, 1.0, 4)


@pytest.fixture
def mlp(key):
    return eqx.nn.MLP(4, 2, 8, depth=2, key=key)


def unit_norms(tree):
    arrays = eqxreg.trainables(tree, eqxreg.weights)
    return np.concatenate([np.sqrt((exact(w) ** 2).sum(1)) for w in arrays])


def test_constrain_wraps_what_is_selected(mlp):
    first = eqxreg.select(where=lambda path, layer, array: "layers[0]" in path)
    wrapped = eqxreg.constrain(mlp, eqxreg.MaxNorm(0.1, axis="unit"), where=first)
    kinds = [type(layer) for layer in wrapped.layers]
    assert kinds == [eqxreg.Constraint, eqx.nn.Linear, eqx.nn.Linear]
    assert np.all(unit_norms(eqxreg.bake(wrapped).layers[0]) <= 0.1)


def test_constrain_takes_a_tree_of_booleans(mlp):
    mask = jax.tree.map(lambda _: False, mlp)
    mask = eqx.tree_at(lambda m: m.layers[1].weight, mask, True)
    wrapped = eqxreg.constrain(mlp, eqxreg.MaxNorm(0.1), where=mask)
    assert [type(w).__name__ for w in wrapped.layers] == [
        "Linear",
        "Constraint",
        "Linear",
    ]


def test_constrain_again_is_outside(mlp):
    inner, outer = eqxreg.MaxNorm(0.1, axis="unit"), eqxreg.NonNegative()
    layer = eqxreg.constrain(eqxreg.constrain(mlp, inner), outer).layers[0]
    assert layer.parametrization == outer
    assert layer.layer.parametrization == inner
    assert type(layer.layer.layer) is eqx.nn.Linear


def test_constrain_goes_outside_of_equinox_wrappers(key):
    model = [eqx.nn.WeightNorm(eqx.nn.Linear(4, 3, key=key))]
    [layer] = eqxreg.constrain(model, eqxreg.MaxNorm(0.1))
    assert type(layer) is eqxreg.Constraint
    assert type(layer.layer) is eqx.nn.WeightNorm


def test_constrain_goes_outside_of_the_wrapper_of_that_weight(key):
    attention = eqx.nn.MultiheadAttention(2, 4, key=key)
    wrapped = eqxreg.MaxNormConstraint(attention, "query_proj.weight", 0.1)
    twice = eqxreg.constrain(wrapped, eqxreg.NonNegative())
    assert twice.weight_name == "query_proj.weight"
    assert type(twice.layer.layer.key_proj) is eqxreg.Constraint
    assert type(twice.layer.layer.query_proj) is eqx.nn.Linear


def test_a_layer_with_several_weights_gets_one_wrapper(key):
    cell = eqx.nn.LSTMCell(4, 3, key=key)
    wrapped = eqxreg.constrain(cell, eqxreg.MaxNorm(0.1, axis="unit"))
    assert wrapped.weight_name == ("weight_ih", "weight_hh")
    own = eqxreg.constrain(Own(key), eqxreg.MaxNorm(0.1))
    assert own.weight_name == ("kernel", "tables.weight")


class Parameters(eqx.Module):
    weight: jax.Array


class Holder(eqx.Module):
    parameters: Parameters

    def __call__(self, x):
        return self.parameters.weight @ x


def test_where_arrays_are_kept_in_a_module_that_is_no_layer():
    model = Holder(Parameters(jnp.ones((3, 4))))
    wrapped = eqxreg.constrain(model, eqxreg.MaxNorm(1.0))
    assert wrapped.weight_name == "parameters.weight"
    assert np.linalg.norm(exact(eqxreg.bake(wrapped).parameters.weight)) <= 1.0
    assert_close(wrapped(X), eqxreg.bake(wrapped)(X))


def test_bake_of_a_model_agrees_and_is_idempotent(mlp):
    wrapped = eqxreg.constrain(mlp, eqxreg.MaxNorm(0.1, axis="unit"))
    wrapped = eqxreg.constrain(wrapped, eqxreg.NonNegative())
    baked = eqxreg.bake(wrapped)
    assert jax.tree.structure(baked) == jax.tree.structure(mlp)
    assert np.all(unit_norms(baked) <= 0.1)
    assert_close(wrapped(X), baked(X))
    assert eqxreg.bake(baked) == baked


def test_bake_is_jittable_and_differentiable(mlp):
    wrapped = eqxreg.constrain(mlp, eqxreg.MaxNorm(0.1, axis="unit"))

    def loss(model):
        return jnp.sum(model(X) ** 2)

    direct = eqx.filter_jit(eqx.filter_grad(loss))(wrapped)
    baked = eqx.filter_jit(eqx.filter_grad(lambda m: loss(eqxreg.bake(m))))(wrapped)
    assert_close(direct, baked)


def test_bake_leaves_other_models_as_they_are(mlp):
    assert eqxreg.bake(mlp) == mlp
    assert eqxreg.bake({"a": 1, "b": [None, jnp.ones(2)]})["a"] == 1


def test_bake_in_a_loop_evaluates_each_constraint_once(key):
    cell = eqx.nn.GRUCell(4, 4, key=key)
    wrapped = eqxreg.constrain(cell, eqxreg.UnitNorm(axis="unit"))
    xs = jnp.ones((5, 4))

    def run(cell, xs):
        step = lambda h, x: (cell(x, h), None)
        return jax.lax.scan(step, jnp.zeros(4), xs)[0]

    def norms_in_loop(fn):
        eqns = jax.make_jaxpr(fn)(xs).jaxpr.eqns
        [loop] = [eqn for eqn in eqns if eqn.primitive.name == "scan"]
        return str(loop.params["jaxpr"]).count("custom_jvp_call")

    assert_close(run(wrapped, xs), run(eqxreg.bake(wrapped), xs))
    inside = norms_in_loop(lambda xs: run(wrapped, xs))
    hoisted = norms_in_loop(lambda xs: run(eqxreg.bake(wrapped), xs))
    assert inside > hoisted == 0


def test_project_params_is_exact_and_layer_by_layer(key):
    mlp = eqx.nn.MLP(4, 2, 8, depth=4, scan=True, key=key)
    projected = eqxreg.project_params(mlp, eqxreg.MaxNorm(0.3))
    for layer in projected.layers:
        norms = np.sqrt((exact(layer.weight) ** 2).sum((-2, -1)))
        assert np.all(norms <= 0.3) and np.all(norms >= 0.3 * (1 - 1e-5))
    biases = [layer.bias for layer in mlp.layers]
    assert all(
        jnp.array_equal(a.bias, b)
        for a, b in zip(projected.layers, biases, strict=True)
    )
    params = eqx.filter(mlp, eqx.is_inexact_array)
    filtered = eqxreg.project_params(params, eqxreg.MaxNorm(0.3))
    assert eqx.tree_equal(filtered, eqx.filter(projected, eqx.is_inexact_array))


def test_an_average_of_weights_is_brought_back_to_a_sphere(mlp):
    p = eqxreg.UnitNorm(axis="unit")
    other = jax.tree.map(lambda x: -x if eqx.is_array(x) else x, mlp)
    other = eqx.tree_at(lambda m: m.layers[0].weight, other, jnp.ones((8, 4)))
    a, b = (eqxreg.project_params(m, p).layers[0] for m in (mlp, other))
    mean = jax.tree.map(lambda x, y: 0.7 * x + 0.3 * y, a, b)
    assert not p.contains(mean.weight)
    assert p.contains(eqxreg.project_params(mean, p).weight)


@pytest.mark.parametrize("name", ["layers.0.weight", "layers[0].weight"])
def test_a_wrapper_is_found_however_its_name_is_written(name, key):
    mlp = eqx.nn.MLP(4, 2, 8, depth=1, key=key)
    wrapped = eqxreg.UnitNormConstraint(mlp, name, axis="unit")
    first = eqxreg.select(where=lambda path, layer, array: "layers[0]" in path)
    # The newest promise is the outermost.
    outer = eqxreg.constrain(wrapped, eqxreg.MaxNorm(0.5), where=first)
    assert jnp.linalg.norm(eqxreg.bake(outer).layers[0].weight) <= 0.5
    [weight] = eqxreg.trainables(wrapped, eqxreg.scale_invariant)
    assert weight is mlp.layers[0].weight
    assert type(eqxreg.freeze(wrapped, first)) is eqxreg.Frozen
