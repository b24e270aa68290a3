"""What a wrapper makes of its layer: its calls, attributes and leaves, its traces, and
stacks of layers."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import filter_jit, jit
from tables import Own, assert_close, exact


pytestmark = pytest.mark.usefixtures("quick_compilation")


X = jnp.linspace(-1.0, 1.0, 4)


def test_the_first_snippet_works(key):
    with jax.numpy_dtype_promotion("standard"):
        linear = eqx.nn.Linear(10, 20, key=key)
        layer = eqxreg.MaxNormConstraint(linear, "weight", 1.0)
        assert layer(jnp.arange(10)).shape == (20,)
        arguments = {"layer": linear, "weight_name": "weight", "max_norm": 1.0}
        named = eqxreg.MaxNormConstraint(**arguments)
        out = named(jnp.arange(10), key=key, inference=True)
    assert named == layer and out.shape == (20,)
    assert layer.max_norm == 1.0 and layer.layer is linear
    assert layer.weight_name == "weight"
    # One norm for the whole weight, unless `axis` says otherwise.
    assert np.linalg.norm(exact(eqxreg.bake(layer).weight)) <= 1.0


NAMED = {
    "max": (eqxreg.MaxNormConstraint, (0.5, "unit"), eqxreg.MaxNorm(0.5, "unit")),
    "min_max": (
        eqxreg.MinMaxNormConstraint,
        (0.2, 0.5, 1.0, "unit"),
        eqxreg.MinMaxNorm(0.2, 0.5, axis="unit"),
    ),
    "unit": (eqxreg.UnitNormConstraint, (0.5, "unit"), eqxreg.UnitNorm(0.5, "unit")),
    "non_negative": (eqxreg.NonNegativeConstraint, (), eqxreg.NonNegative()),
    "box": (eqxreg.BoxConstraint, (-0.1, 0.2), eqxreg.Box(-0.1, 0.2)),
}


@pytest.mark.parametrize("name", list(NAMED))
def test_a_named_wrapper_only_builds_its_map(name, linear):
    cls, args, p = NAMED[name]
    wrapped = cls(linear, "weight", *args)
    assert isinstance(wrapped, eqxreg.Constraint)
    assert wrapped.parametrization == p
    assert jnp.array_equal(eqxreg.bake(wrapped).weight, p(linear.weight))


def test_weight_norm_starts_as_the_layer_it_wraps(linear):
    wrapped = eqxreg.WeightNormConstraint(linear)
    assert wrapped.g.shape == (3, 1)
    assert jnp.array_equal(wrapped(X), linear(X))


def test_weight_norm_is_that_of_equinox(linear):
    ours, theirs = eqxreg.WeightNormConstraint(linear), eqx.nn.WeightNorm(linear)
    gradient = filter_jit(eqx.filter_grad(lambda m: jnp.sum(jnp.sin(m(X)))))
    a, b = gradient(ours), gradient(theirs)
    assert_close((a.layer.weight, a.g), (b.layer.weight, b.g))


def test_weight_norm_is_finite_at_a_zero_unit_and_can_leave_it(linear):
    linear = eqx.tree_at(lambda m: m.weight, linear, linear.weight.at[1].set(0.0))
    wrapped = eqxreg.WeightNormConstraint(linear)
    grads = eqx.filter_grad(lambda m: jnp.sum(m(X)))(wrapped)
    assert all(jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads))
    assert jnp.any(grads.layer.weight[1] != 0)


# Arguments


class Picky(eqx.Module):
    weight: jax.Array

    def __call__(self, x, scale, *, shift=0.0):
        return self.weight @ x * scale + shift


class Greedy(eqx.Module):
    weight: jax.Array

    def __call__(self, x, **kwargs):
        return sorted(kwargs)


def test_key_and_inference_go_only_where_they_are_taken(linear, key):
    weight = linear.weight
    picky = eqxreg.MaxNormConstraint(Picky(weight), "weight", 9.0)
    assert picky(X, 2.0, shift=1.0, key=key, inference=True).shape == (3,)
    greedy = eqxreg.MaxNormConstraint(Greedy(weight), "weight", 9.0)
    assert greedy(X, key=key, inference=True) == ["inference", "key"]
    with pytest.raises(TypeError):
        picky(X, 2.0, unknown=1.0)


def test_dropout_inside_gets_its_key(key):
    attention = eqx.nn.MultiheadAttention(2, 4, dropout_p=0.5, key=key)
    wrapped = eqxreg.MaxNormConstraint(attention, "query_proj.weight", 0.3)
    x = jnp.ones((3, 4))
    a, b = (wrapped(x, x, x, key=jax.random.key(i)) for i in range(2))
    assert not jnp.array_equal(a, b)
    c, d = (wrapped(x, x, x, key=jax.random.key(i), inference=True) for i in range(2))
    assert jnp.array_equal(c, d)
    frozen = eqx.nn.inference_mode(wrapped)
    assert jnp.array_equal(frozen(x, x, x), c)


# Attributes


def test_attributes_are_read_from_the_layer_within(linear):
    wrapped = eqxreg.MaxNormConstraint(linear, "weight", 0.3)
    twice = eqxreg.NonNegativeConstraint(wrapped, "weight")
    around = eqxreg.MaxNormConstraint(eqx.nn.WeightNorm(linear), "weight", 0.3)
    for layer in (wrapped, twice, around):
        assert layer.weight is linear.weight
        assert layer.in_features == 4
        assert not hasattr(layer, "inference")
        with pytest.raises(AttributeError, match="has an attribute 'wieght'"):
            _ = layer.wieght


def test_a_method_of_the_layer_runs_with_the_constrained_weight(key):
    own = Own(key)
    wrapped = eqxreg.MaxNormConstraint(own, "kernel", 0.3)
    baked = eqxreg.bake(wrapped)
    assert jnp.array_equal(wrapped.encode(X), baked.encode(X))
    assert not jnp.allclose(wrapped.encode(X), own.encode(X))


def test_tree_at_reaches_the_raw_weight(linear):
    wrapped = eqxreg.MaxNormConstraint(linear, "weight", 0.3)
    moved = eqx.tree_at(lambda w: w.weight, wrapped, jnp.zeros((3, 4)))
    assert jnp.array_equal(moved.layer.weight, jnp.zeros((3, 4)))


class Methods(eqx.Module):
    weight: jax.Array
    table = (1, 2)

    @eqx.filter_jit
    def compiled(self, x):
        return self.weight @ x

    @property
    def norm(self):
        return jnp.linalg.norm(self.weight)

    def __call__(self, x):
        return self.weight @ x


def test_whatever_computes_sees_the_constrained_weight():
    inner = eqxreg.NonNegativeConstraint(Methods(10 * jnp.eye(4)), "weight")
    wrapped = eqxreg.MaxNormConstraint(inner, "weight", 1.0)
    assert_close(wrapped.compiled(X), wrapped(X))
    np.testing.assert_allclose(wrapped.norm, 1.0, rtol=1e-5)
    assert wrapped.table == (1, 2)
    assert eqxreg.NonNegativeConstraint(wrapped, "weight").max_norm == 1.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weight_norm_starts_as_the_layer_it_wraps_in_half_precision(dtype, key):
    linear = eqx.nn.Linear(64, 64, dtype=dtype, key=key)
    wrapped = eqxreg.WeightNormConstraint(linear)
    assert jnp.array_equal(eqxreg.bake(wrapped).weight, linear.weight)
    largest = jnp.full((2, 2), 6e4, "float16")
    linear = eqx.tree_at(lambda m: m.weight, linear, largest)
    assert jnp.array_equal(
        eqxreg.bake(eqxreg.WeightNormConstraint(linear)).weight, largest
    )


@pytest.mark.parametrize("old", [1.0, jnp.asarray(1.0)], ids=["number", "array"])
def test_a_bound_may_be_replaced_by_a_number(old, linear):
    layer = eqxreg.MaxNormConstraint(linear, "weight", old)
    for bound in (2.0, 2):
        is_none = {"is_leaf": lambda x: x is old}
        layer = eqx.tree_at(lambda m: m.max_norm, layer, bound, **is_none)
        expected = eqxreg.MaxNormConstraint(linear, "weight", 2.0)(X)
        assert_close(layer(X), expected)


def test_a_stack_of_own_modules_runs_under_vmap(key):
    stack = eqx.filter_vmap(Own)(jax.random.split(key, 3))
    wrapped = eqxreg.MaxNormConstraint(stack, "kernel", 0.3)
    outputs = eqx.filter_vmap(lambda m: m(X))(wrapped)
    single = jax.tree.map(lambda x: x[1], stack)
    expected = eqxreg.MaxNormConstraint(single, "kernel", 0.3)(X)
    assert_close(outputs[1], expected)


# Trees, equality and traces


def test_leaves_are_arrays_only(linear):
    wrapped = eqxreg.MaxNormConstraint(linear, "weight", 2.0, "unit")
    assert all(eqx.is_array(leaf) for leaf in jax.tree.leaves(wrapped))
    assert len(jax.tree.leaves(wrapped)) == len(jax.tree.leaves(linear))


@pytest.mark.parametrize("bound", [2, 2.0, np.float32(2.0), np.asarray(2.0)])
def test_equal_wrappers_share_one_trace(linear, bound):
    traces = 0

    @filter_jit
    def call(layer, x):
        nonlocal traces
        traces += 1
        return layer(x)

    first = eqxreg.MaxNormConstraint(linear, "weight", 2.0)
    second = eqxreg.MaxNormConstraint(linear, "weight", bound)
    assert first == second
    call(first, X), call(second, X)
    assert traces == 1


def test_a_traced_bound_changes_without_a_new_trace(linear):
    traces = 0

    @filter_jit
    def norm(layer):
        nonlocal traces
        traces += 1
        return jnp.linalg.norm(eqxreg.bake(layer).weight)

    layer = eqxreg.MaxNormConstraint(linear, "weight", jnp.asarray(0.5))
    for bound in (0.5, 0.25):
        layer = eqx.tree_at(lambda m: m.max_norm, layer, jnp.asarray(bound))
        np.testing.assert_allclose(norm(layer), bound, rtol=1e-5)
    assert traces == 1


def test_plain_grad_and_optimisers_leave_a_bound_alone(linear):
    layer = eqxreg.MaxNormConstraint(linear, "weight", jnp.asarray(0.5))
    grads = eqx.filter_grad(lambda m: jnp.sum(m(X) ** 2))(layer)
    assert grads.max_norm is None
    assert not eqxreg.trainable(layer).max_norm


def test_profiles_show_the_constraint(linear):
    wrapped = eqxreg.MaxNormConstraint(linear, "weight", 2.0)
    text = jit(lambda x: wrapped(x)).lower(X).as_text(debug_info=True)
    assert "eqxreg.MaxNormConstraint" in text


# Stacks


@pytest.mark.parametrize("bound", [0.3, jnp.asarray(0.3)], ids=["number", "array"])
def test_a_scanned_mlp_is_constrained_layer_by_layer(bound, key):
    mlp = eqx.nn.MLP(4, 2, 8, depth=4, scan=True, key=key)
    wrapped = eqxreg.constrain(mlp, eqxreg.MaxNorm(bound, axis=None))
    baked = eqxreg.bake(wrapped)
    norms = np.sqrt((exact(baked.layers[1].weight) ** 2).sum((1, 2)))
    np.testing.assert_allclose(norms, 0.3, rtol=1e-5)
    run = filter_jit(lambda m, x: m(x))
    assert_close(run(wrapped, X), run(baked, X))
    grads = filter_jit(eqx.filter_grad(lambda m: jnp.sum(m(X) ** 2)))(wrapped)
    assert all(jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads))


def test_an_ensemble_of_scanned_mlps(key):
    def make(key):
        mlp = eqx.nn.MLP(4, 2, 8, depth=3, scan=True, key=key)
        return eqxreg.constrain(mlp, eqxreg.MaxNorm(0.3))

    ensemble = eqx.filter_vmap(make)(jax.random.split(key, 2))
    weight = eqxreg.bake(ensemble).layers[1].weight
    assert weight.shape == (2, 2, 8, 8)
    np.testing.assert_allclose(
        np.sqrt((exact(weight) ** 2).sum((2, 3))), 0.3, rtol=1e-5
    )
    out = eqx.filter_vmap(lambda m: m(X))(ensemble)
    assert out.shape == (2, 2)


def test_weight_norm_of_a_stack_scans(key):
    mlp = eqx.nn.MLP(4, 2, 8, depth=4, scan=True, key=key)
    layers = tuple(eqxreg.WeightNormConstraint(layer) for layer in mlp.layers)
    wrapped = eqx.tree_at(lambda m: m.layers, mlp, layers)
    assert wrapped.layers[1].g.shape == (3, 8, 1)
    assert_close(wrapped(X), mlp(X))
