"""Lipschitz bounds of linear layers and networks are never below the truth, and near it
where they promise to be; and their gradients.

Truths are singular values of dense Jacobians, in numpy and in double precision.
"""

import math

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jacobians import built, dense_norm, linear, orthogonal, steepest
from quick import filter_jit, jit


pytestmark = pytest.mark.usefixtures("quick_compilation")

nn = eqx.nn


def test_a_linear_layers_bound_is_its_largest_singular_value():
    rng = np.random.default_rng(0)
    for shape in ((30, 20), (4, 7), (1, 4)):
        weight = rng.standard_normal(shape).astype(np.float32)
        truth = np.linalg.norm(np.asarray(weight, np.float64), 2)
        bound = eqxreg.lipschitz_bound(linear(weight))
        assert truth <= bound <= truth * (1 + 1e-4)
        assert bound.shape == () and bound.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_a_bound_is_real_and_of_single_precision_at_least(dtype, scale, key):
    weight = (jax.random.normal(key, (6, 5)) * scale).astype(dtype)
    wide = np.complex128 if dtype == "complex64" else np.float64
    truth = np.linalg.norm(np.asarray(weight).astype(wide), 2)
    bound = eqxreg.lipschitz_bound(linear(weight))
    assert bound.dtype == jnp.float32
    assert truth <= bound <= truth * (1 + 1e-4)


@pytest.mark.parametrize("sizes", [("scalar", 3), (3, "scalar"), ("scalar", "scalar")])
def test_scalar_features_are_vectors_of_size_one(sizes):
    layer = built(nn.Linear, *sizes)
    truth = np.linalg.norm(np.asarray(layer.weight, np.float64))
    bound = eqxreg.lipschitz_bound(layer)
    assert truth <= bound <= truth * (1 + 1e-4)


def test_the_bound_of_a_linear_network_is_the_product_of_singular_values(key):
    mlp = built(nn.MLP, 8, 8, 8, depth=3, activation=jax.nn.identity)
    weights = [np.asarray(layer.weight, np.float64) for layer in mlp.layers]
    truth = math.prod(np.linalg.norm(w, 2) for w in weights)
    bound = eqxreg.lipschitz_bound(mlp)
    assert truth <= bound <= truth * (1 + 1e-3)


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.gelu, jnp.sin])
def test_no_jacobian_of_a_network_is_above_its_bound(activation, key):
    mlp = built(nn.MLP, 3, 2, 16, depth=2, activation=activation)
    starts = 3 * jax.random.normal(key, (64, 3))
    found = steepest(mlp, starts)
    bound = eqxreg.lipschitz_bound(mlp)
    assert 0.1 * bound < found <= bound


def test_no_jacobian_of_a_convolutional_network_is_above_its_bound(key):
    model = nn.Sequential(
        [
            built(nn.Conv2d, 1, 4, 3, padding=1, padding_mode="REFLECT"),
            eqxreg.MaxMin(),
            nn.MaxPool2d(2, 2),
            built(nn.Conv2d, 4, 4, 3, stride=2),
            nn.Dropout(0.5),
            nn.Lambda(nn.PReLU(1.5)),
            nn.AdaptiveAvgPool2d(1),
            nn.Lambda(jnp.ravel),
            built(nn.Linear, 4, 3),
        ]
    )
    bound = eqxreg.lipschitz_bound(model, (1, 10, 10))
    model = nn.inference_mode(model)
    images = 3 * jax.random.normal(key, (256, 1, 10, 10))
    jacobians = jit(jax.vmap(jax.jacrev(model)))(images).reshape(256, 3, 100)
    found = np.linalg.norm(np.asarray(jacobians, np.float64), 2, axis=(1, 2)).max()
    assert 0.01 * bound < found <= bound


@pytest.mark.parametrize("sort", [eqxreg.MaxMin(), eqxreg.GroupSort(4)], ids=str)
def test_an_orthogonal_sorting_network_is_one_lipschitz_and_its_bound_says_so(sort):
    rng = np.random.default_rng(0)
    layers = []
    for rows, columns in ((16, 6), (16, 16), (16, 16), (16, 16), (6, 16)):
        layers.extend([orthogonal(rng, rows, columns), sort])
    model = nn.Sequential(layers[:-1])
    points = jnp.asarray(rng.standard_normal((64, 6)), jnp.float32)
    found = steepest(model, points, steps=3)
    bound = eqxreg.lipschitz_bound(model)
    assert 0.9 < found <= bound <= 1 + 1e-3


def test_scanned_layers_have_the_bound_of_plain_ones():
    plain = built(nn.MLP, 5, 5, 5, 4, jax.nn.gelu)
    first, *hidden, last = plain.layers
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *hidden)
    scanned = built(nn.MLP, 5, 5, 5, 4, jax.nn.gelu, scan=True)
    scanned = eqx.tree_at(lambda m: m.layers, scanned, (first, stack, last))
    expected = eqxreg.lipschitz_bound(plain)
    np.testing.assert_allclose(eqxreg.lipschitz_bound(scanned), expected, rtol=1e-5)


def test_a_trained_activation_counts_in_each_layer_with_its_steepest_feature():
    mlp = built(nn.MLP, 5, 5, 5, 2, nn.PReLU(), nn.PReLU())
    where = lambda m: (m.activation.negative_slope, m.final_activation.negative_slope)
    flat = eqx.tree_at(where, mlp, (jnp.zeros((2, 5)), jnp.zeros(5)))
    slopes = (
        jnp.full((2, 5), 0.5).at[1, 3].set(-2.0),
        jnp.array([3.0, 0.1, 0.0, 1.0, -1.0]),
    )
    steep = eqxreg.lipschitz_bound(eqx.tree_at(where, mlp, slopes))
    np.testing.assert_allclose(steep, 6 * eqxreg.lipschitz_bound(flat), rtol=1e-5)


@pytest.mark.parametrize("out_size", ["scalar", 2])
def test_a_network_without_hidden_layers_has_the_bound_of_its_layer(out_size, key):
    mlp = built(nn.MLP, 3, out_size, 5, depth=0, final_activation=jnp.tanh)
    expected = eqxreg.lipschitz_bound(mlp.layers[0])
    np.testing.assert_allclose(eqxreg.lipschitz_bound(mlp), expected, rtol=1e-5)


def test_wrappers_are_baked(key):
    mlp = built(nn.MLP, 8, 8, 8, depth=2)
    constrained = eqxreg.constrain(mlp, eqxreg.MaxNorm(0.5))
    bound = eqxreg.lipschitz_bound(constrained)
    assert bound == eqxreg.lipschitz_bound(eqxreg.bake(constrained))
    assert bound <= 0.5**3 * (1 + 1e-4)
    row = eqxreg.UnitNormConstraint(built(nn.Linear, 5, 1), "weight")
    np.testing.assert_allclose(eqxreg.lipschitz_bound(row), 1, rtol=1e-4)


def test_a_wrapper_that_needs_a_state_says_how_to_bake_it(key):
    layer = nn.SpectralNorm(built(nn.Linear, 3, 2), "weight", key=key)
    model, state = nn.make_with_state(nn.Sequential)([layer])
    with pytest.raises(ValueError, match=r"`bake\(model, state\)`.*Then bound"):
        eqxreg.lipschitz_bound(model)
    baked = eqxreg.bake(model, state)
    assert eqxreg.lipschitz_bound(baked) >= dense_norm(baked, (3,))


def test_the_bound_is_the_same_under_jit():
    layers = [built(nn.Conv1d, 2, 2, 2), nn.Lambda(jnp.ravel), built(nn.Linear, 8, 3)]
    model = nn.Sequential(layers)
    jitted = filter_jit(eqxreg.lipschitz_bound)(model, (2, 5))
    np.testing.assert_allclose(jitted, eqxreg.lipschitz_bound(model), rtol=1e-5)


@pytest.mark.parametrize(
    ("layer_type", "arguments"),
    [(nn.Linear, (5, 4)), (nn.Conv2d, (2, 3, 2, 2)), (nn.ConvTranspose1d, (2, 4, 3))],
)
@pytest.mark.usefixtures("x64")
def test_the_gradient_of_the_bound_is_that_of_finite_differences(layer_type, arguments):
    layer = built(layer_type, *arguments)
    model = nn.Sequential([layer, nn.Lambda(jax.nn.gelu), layer])

    @jit
    @jax.value_and_grad
    def bound(weight):
        where = lambda m: (m.layers[0].weight, m.layers[2].weight)
        return eqxreg.lipschitz_bound(eqx.tree_at(where, model, (weight, 2 * weight)))

    value, gradient = bound(layer.weight)
    direction = np.random.default_rng(0).standard_normal(gradient.shape)
    step = 1e-4 * direction
    expected = (bound(layer.weight + step)[0] - bound(layer.weight - step)[0]) / 2e-4
    np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-5)
    assert value.dtype == jnp.float64


def test_an_ensemble_is_bounded_under_vmap(key):
    keys = jax.random.split(key, 3)
    build = lambda key: built(nn.Conv1d, 2, 3, 3)
    stack = eqx.filter_vmap(build)(keys)
    bounds = eqx.filter_vmap(eqxreg.lipschitz_bound)(stack)
    single = [eqxreg.lipschitz_bound(build(k)) for k in keys]
    np.testing.assert_allclose(bounds, jnp.stack(single), rtol=1e-3)
    with pytest.raises(ValueError, match=r"rank 4, where one layer has rank 3"):
        eqxreg.lipschitz_bound(stack)


@pytest.mark.parametrize("layer", [built(nn.Linear, 3, 2), built(nn.Conv1d, 3, 2, 3)])
def test_a_layer_of_zeros_has_the_bound_zero_and_a_finite_gradient(layer):
    layer = jax.tree.map(jnp.zeros_like, layer)
    bound, gradient = eqx.filter_value_and_grad(eqxreg.lipschitz_bound)(layer)
    assert bound == 0
    assert all(jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("layer", [built(nn.Linear, 3, 2), built(nn.Conv1d, 3, 2, 3)])
@pytest.mark.parametrize("fault", [jnp.nan, jnp.inf, -jnp.inf])
def test_faults_in_a_weight_stay_visible(layer, fault):
    weight = layer.weight.at[1, 1].set(fault)
    bound = eqxreg.lipschitz_bound(eqx.tree_at(lambda m: m.weight, layer, weight))
    assert not jnp.isfinite(bound)


def test_a_product_that_underflows_is_not_zero():
    small = linear(jnp.full((1, 1), 1e-30))
    assert 0 < eqxreg.lipschitz_bound(nn.Sequential([small, small])) < 1e-37
