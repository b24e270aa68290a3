"""Lipschitz bounds are never below the truth, and near it where they promise to be.

Truths are singular values of dense Jacobians, in numpy and in double precision.
"""

import functools as ft
import math

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import filter_jit, jit


pytestmark = pytest.mark.usefixtures("quick_compilation")

nn = eqx.nn
KEY = jax.random.key(0)


def built(layer_type, *args, **kwargs):
    """A layer with Gaussian weights from numpy: a draw by JAX would be compiled anew
    for each shape."""
    rng = np.random.default_rng(len(args))
    layer = eqx.filter_eval_shape(layer_type, *args, **kwargs, key=KEY)

    def draw(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return jnp.asarray(rng.standard_normal(leaf.shape) / 2, leaf.dtype)

    return jax.tree.map(draw, layer)


def dense_norm(layer, shape) -> float:
    """The largest singular value of a layer's Jacobian at zero."""
    zeros = np.zeros(shape, np.float32)
    jacobian = np.asarray(jit(jax.jacobian(layer))(zeros), np.float64)
    return np.linalg.norm(jacobian.reshape(-1, math.prod(shape)), 2)


def linear_norm(layer, shape) -> float:
    """The largest singular value of a linear layer, column by column of its matrix."""
    size = math.prod(shape)
    inputs = np.eye(size, dtype=np.float32).reshape(size, *shape)
    outputs = jit(jax.vmap(layer))(inputs)
    return np.linalg.norm(np.asarray(outputs, np.float64).reshape(size, -1), 2)


def steepest(function, x, steps=20, rate=0.5) -> float:
    """The largest norm of a Jacobian that gradient ascent finds, from the points x."""
    jacobian = jax.jacrev(function)

    @jit
    @jax.vmap
    def ascend(x):
        slope = jax.grad(lambda x: jnp.sum(jacobian(x) ** 2))(x)
        return x + rate * slope / (jnp.linalg.norm(slope) + 1e-12)

    for _ in range(steps):
        x = ascend(x)
    jacobians = np.asarray(jit(jax.vmap(jacobian))(x), np.float64)
    return np.linalg.norm(jacobians, 2, axis=(1, 2)).max()


def linear(weight) -> nn.Linear:
    """A linear layer with this weight and no bias."""
    weight = jnp.asarray(weight)
    layer = built(nn.Linear, *weight.shape[::-1], use_bias=False)
    return eqx.tree_at(lambda m: m.weight, layer, weight)


def orthogonal(rng, rows, columns) -> nn.Linear:
    square = np.linalg.qr(rng.standard_normal((max(rows, columns),) * 2))[0]
    return linear(square[:rows, :columns].astype(np.float32))


# The layer's arguments, the input's shape, and how far above the truth the bound may
# be. On small images it is further above, for it holds for images of any size.
_CONV1D, _CONV2D = (nn.Conv1d, 3, 4, 3), (nn.Conv2d, 2, 3, 3)
_TRANSPOSED = (nn.ConvTranspose1d, 3, 4, 5)
_CIRCULAR = {"padding_mode": "CIRCULAR"}
CONVOLUTIONS = {
    "1d": (_CONV1D, {}, (3, 64), 1.015),
    "1d-wide-padding": (_CONV1D, {"padding": ((5, 1),)}, (3, 64), 1.015),
    "1d-same": (_CONV1D, {"padding": "SAME"}, (3, 64), 1.015),
    "1d-stride": (_CONV1D, {"stride": 2}, (3, 64), 1.015),
    "1d-stride-over": (_CONV1D, {"stride": 4}, (3, 32), 1.001),
    "1d-coprime": (_CONV1D, {"stride": 2, "dilation": 3}, (3, 99), 1.03),
    "1d-common": (_CONV1D, {"stride": 4, "dilation": 6}, (3, 99), 1.05),
    "1d-groups": ((nn.Conv1d, 4, 6, 4), {"groups": 2}, (4, 64), 1.015),
    "1d-circular-same": (_CONV1D, {"padding": "SAME", **_CIRCULAR}, (3, 32), 1.005),
    "1d-circular-longer": (_CONV1D, {"padding": 4, **_CIRCULAR}, (3, 8), 1.5),
    "1d-circular-stride": (
        _CONV1D,
        {"padding": 1, "stride": 2, **_CIRCULAR},
        (3, 32),
        1.005,
    ),
    "1d-circular-odd": (
        _CONV1D,
        {"padding": 1, "stride": 2, **_CIRCULAR},
        (3, 15),
        1.5,
    ),
    "1d-replicate": (
        _CONV1D,
        {"padding": "SAME", "stride": 2, "padding_mode": "REPLICATE"},
        (3, 9),
        1.6,
    ),
    "2d": (_CONV2D, {"padding": 1}, (2, 12, 12), 1.06),
    "2d-reflect": (_CONV2D, {"padding": 1, "padding_mode": "REFLECT"}, (2, 7, 7), 2.2),
    "2d-mixed": (
        (nn.Conv2d, 2, 3, (3, 1)),
        {"stride": (2, 1), "dilation": (1, 2), "padding": ((0, 1), (2, 0))},
        (2, 32, 4),
        1.015,
    ),
    "3d": ((nn.Conv3d, 2, 2, 2), {"padding": 1}, (2, 6, 6, 6), 1.1),
    "transposed": (
        _TRANSPOSED,
        {"stride": 2, "padding": 2, "output_padding": 1},
        (3, 40),
        1.015,
    ),
    "transposed-circular": (
        _TRANSPOSED,
        {"stride": 2, "padding": "SAME", **_CIRCULAR},
        (3, 32),
        1.005,
    ),
    "transposed-circular-over": (
        _TRANSPOSED,
        {"stride": 7, "padding": "SAME", **_CIRCULAR},
        (3, 9),
        1.005,
    ),
    "transposed-2d": (
        (nn.ConvTranspose2d, 4, 2, 3),
        {"stride": (2, 3), "dilation": (2, 1), "groups": 2, "padding": "SAME"},
        (4, 16, 3),
        1.05,
    ),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolutions_bound_is_not_below_its_norm_and_near_it(case):
    (build, *sizes), options, shape, slack = CONVOLUTIONS[case]
    layer = built(build, *sizes, **options, use_bias=False)
    truth = linear_norm(layer, shape)
    bound = float(eqxreg.lipschitz_bound(layer, shape))
    assert truth <= bound <= truth * slack


@pytest.mark.parametrize("edge", ["REFLECT", "REPLICATE"])
def test_padding_that_repeats_entries_is_counted(edge):
    """Where padded entries make the norm larger than that of the lattice."""
    layer = built(nn.Conv1d, 1, 1, 3, padding=2, padding_mode=edge, use_bias=False)
    layer = eqx.tree_at(lambda m: m.weight, layer, jnp.array([[[1.0, 0.0, 0.0]]]))
    truth = linear_norm(layer, (1, 7))
    assert truth > 1.4
    assert truth <= eqxreg.lipschitz_bound(layer, (1, 7)) <= truth * 1.01


def test_a_peak_between_the_points_of_the_grid_is_not_missed():
    angles = np.linspace(0.3, 0.4, 7)
    taps = np.arange(4)
    for angle in angles:
        kernel = np.exp(1j * angle * taps).astype(np.complex64)
        layer = built(nn.Conv1d, 1, 1, 4)
        layer = eqx.tree_at(lambda m: m.weight, layer, jnp.asarray(kernel[None, None]))
        assert 4 <= eqxreg.lipschitz_bound(layer) <= 4 * 1.002


POOLS = {
    "avg": (nn.AvgPool1d(3, 2), (2, 41), 1.02),
    "avg-overlap": (nn.AvgPool1d(5, 2), (1, 41), 1.02),
    "avg-disjoint": (nn.AvgPool2d(2, 2), (1, 6, 6), 1.001),
    "avg-padded": (nn.AvgPool2d(2, 1, padding=1), (1, 9, 9), 1.03),
    "avg-ceil": (nn.AvgPool1d(3, 2, use_ceil=True), (1, 42), 1.02),
    "sum": (nn.Pool(0, jax.lax.add, 1, 3, 3), (2, 9), 1.001),
    "adaptive-avg": (nn.AdaptiveAvgPool2d((2, 3)), (1, 6, 6), 1.001),
    "adaptive-avg-uneven": (nn.AdaptiveAvgPool1d(3), (1, 8), 1.001),
}


@pytest.mark.parametrize("case", POOLS)
def test_an_average_pools_bound_is_not_below_its_norm_and_near_it(case):
    layer, shape, slack = POOLS[case]
    truth = dense_norm(layer, shape)
    assert truth * (1 - 1e-6) <= eqxreg.lipschitz_bound(layer, shape) <= truth * slack
    assert truth * (1 - 1e-6) <= eqxreg.lipschitz_bound(layer)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.MaxPool1d(3, 2), (1, 9)),
        (nn.MaxPool2d(2, 2), (1, 4, 4)),
        (nn.MaxPool2d(3, 2, padding=1), (1, 7, 7)),
        (nn.Pool(jnp.inf, jax.lax.min, 1, 3, 2), (1, 9)),
        (nn.AdaptiveMaxPool1d(3), (1, 8)),
    ],
)
def test_a_maximum_pools_bound_is_attained_at_a_peak(layer, shape):
    size = math.prod(shape)
    peaks = np.eye(size, dtype=np.float32)
    if layer.operation is jax.lax.min:
        peaks = -peaks
    noise = np.random.default_rng(0).standard_normal((size, size))
    images = jnp.asarray(peaks + 1e-3 * noise, jnp.float32).reshape(size, *shape)
    jacobians = jit(jax.vmap(jax.jacobian(layer)))(images)
    jacobians = np.asarray(jacobians, np.float64).reshape(size, -1, size)
    truth = np.linalg.norm(jacobians, 2, axis=(1, 2)).max()
    np.testing.assert_allclose(eqxreg.lipschitz_bound(layer), truth, rtol=1e-6)


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


def _leaky(slope):
    return ft.partial(jax.nn.leaky_relu, negative_slope=slope)


ELEMENTWISE = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "tanh": jnp.tanh,
    "jax.nn.tanh": jax.nn.tanh,
    "lax.tanh": jax.lax.tanh,
    "sigmoid": jax.nn.sigmoid,
    "logistic": jax.lax.logistic,
    "softplus": jax.nn.softplus,
    "sparse_plus": jax.nn.sparse_plus,
    "sparse_sigmoid": jax.nn.sparse_sigmoid,
    "elu": jax.nn.elu,
    "elu-2": ft.partial(jax.nn.elu, alpha=2.0),
    "celu": jax.nn.celu,
    "celu-2": ft.partial(jax.nn.celu, alpha=2.0),
    "selu": jax.nn.selu,
    "leaky_relu": jax.nn.leaky_relu,
    "leaky_relu-steep": _leaky(-3.0),
    "gelu": jax.nn.gelu,
    "gelu-tanh": ft.partial(jax.nn.gelu, approximate=True),
    "gelu-exact": ft.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "swish": jax.nn.swish,
    "mish": jax.nn.mish,
    "hard_tanh": jax.nn.hard_tanh,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_silu": jax.nn.hard_silu,
    "soft_sign": jax.nn.soft_sign,
    "log_sigmoid": jax.nn.log_sigmoid,
    "squareplus": jax.nn.squareplus,
    "squareplus-1": ft.partial(jax.nn.squareplus, b=1.0),
    "abs": jnp.abs,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "arctan": jnp.arctan,
    "arcsinh": jnp.arcsinh,
    "negative": jnp.negative,
    "identity": jax.nn.identity,
}


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.usefixtures("x64")
def test_the_constant_of_an_activation_is_its_largest_slope(name):
    function = ELEMENTWISE[name]
    # Between two points of a dense grid; some slopes are reached far out only.
    grids = (np.linspace(-4, 4, 400_001), np.linspace(-40, 40, 4_001))
    slopes = [np.diff(function(jnp.asarray(x))) / np.diff(x) for x in grids]
    truth = max(np.abs(slope).max() for slope in slopes)
    bound = float(eqxreg.lipschitz_bound(function))
    assert truth * (1 - 1e-9) <= bound <= truth * (1 + 2e-3)
    if name.startswith(("gelu", "silu", "mish")):
        assert bound <= truth * (1 + 1e-6)


@pytest.mark.parametrize(
    ("function", "x", "shape"),
    [
        (jax.nn.softmax, (0.0, 0.0, -40.0), None),
        (ft.partial(jax.nn.softmax, axis=0), (0.0, 0.0, -40.0), None),
        (jax.nn.log_softmax, (60.0, 0.0, 0.0), (3,)),
        (jax.nn.logsumexp, (60.0, 0.0, 0.0), None),
        (jnp.sort, (2.0, 1.0, 3.0), None),
        (jnp.ravel, (2.0, 1.0, 3.0), None),
    ],
)
def test_the_constant_of_a_function_of_vectors_is_attained(function, x, shape):
    jacobian = jit(jax.jacobian(function))(jnp.array(x))
    jacobian = np.asarray(jacobian, np.float64)
    truth = np.linalg.norm(np.atleast_2d(jacobian), 2)
    bound = eqxreg.lipschitz_bound(function, shape)
    np.testing.assert_allclose(bound, truth, rtol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [nn.Identity(), nn.Dropout(0.5), eqxreg.MaxMin(), eqxreg.GroupSort(3)],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_keep_distances_have_the_bound_one(layer):
    assert eqxreg.lipschitz_bound(nn.Sequential([layer, layer])) == 1
    assert eqxreg.lipschitz_bound(layer) == 1


def test_the_slopes_of_a_prelu_count():
    assert eqxreg.lipschitz_bound(nn.PReLU()) == 1
    assert eqxreg.lipschitz_bound(nn.PReLU(jnp.array([0.5, -3.0]))) == 3


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


class Doubled(eqx.Module):
    """A layer of the tests' own, with a child."""

    inner: nn.Linear

    def __call__(self, x, *, key=None):
        return 2 * self.inner(x)


def test_a_registered_rule_serves_its_layer_and_its_subclasses(key):
    class Own(Doubled):
        pass

    class Child(Own):
        def __call__(self, x, *, key=None):
            return super().__call__(-x)

    seen = []

    @eqxreg.lipschitz_bound.register(Own)
    def rule(layer, input_shape):
        seen.append(input_shape)
        return 2 * eqxreg.lipschitz_bound(layer.inner, input_shape)

    inner = built(nn.Linear, 3, 3)
    model = nn.Sequential([Own(inner), Child(inner)])
    expected = 4 * eqxreg.lipschitz_bound(inner) ** 2
    np.testing.assert_allclose(eqxreg.lipschitz_bound(model, (3,)), expected, rtol=1e-5)
    assert seen == [(3,), (3,)]
    assert rule(Own(inner), None) > 0


@pytest.mark.parametrize(
    "bad", [-1.0, math.nan, None, jnp.ones(2), jnp.array(1), 1j], ids=str
)
def test_a_registered_rule_must_return_a_bound(bad, key):
    class Own(Doubled):
        pass

    eqxreg.lipschitz_bound.register(Own)(lambda layer, input_shape: bad)
    with pytest.raises(ValueError, match="rule for Own .* must return a non-negative"):
        eqxreg.lipschitz_bound(Own(built(nn.Linear, 3, 3)))


def test_only_classes_are_registered():
    with pytest.raises(TypeError, match="takes a class, as in .*got Identity"):
        eqxreg.lipschitz_bound.register(nn.Identity())


def test_a_subclass_with_a_call_of_its_own_has_no_bound_by_inheritance(key):
    class Scaled(nn.Linear):
        def __call__(self, x, *, key=None):
            return 10 * super().__call__(x)

    class Plain(nn.Linear):
        pass

    with pytest.raises(ValueError, match="is a Scaled, which is called differently"):
        eqxreg.lipschitz_bound(Scaled(2, 2, key=key))
    assert eqxreg.lipschitz_bound(Plain(2, 2, key=key)) > 0


def _seq(layer):
    return nn.Sequential([nn.Identity(), layer])


_SAME = {"padding": "SAME"}
UNBOUNDED = {
    "norm": (_seq(nn.LayerNorm(3)), r"`\.layers\[1\]` is a LayerNorm, .*1/sqrt\(eps\)"),
    "rms": (_seq(nn.RMSNorm(3)), r"is a RMSNorm, .*1/sqrt\(eps\)"),
    "group": (_seq(nn.GroupNorm(1, 3)), r"is a GroupNorm, .*1/sqrt\(eps\)"),
    "batch": (
        _seq(nn.BatchNorm(3, "batch", mode="batch")),
        "is a BatchNorm, .*depends on the batch",
    ),
    "attention": (
        built(nn.MultiheadAttention, 1, 4),
        "The model is a MultiheadAttention, .*not globally Lipschitz .*Mnih, 2021",
    ),
    "gru": (built(nn.GRUCell, 2, 2), "is a GRUCell, .*grows with the state"),
    "lstm": (built(nn.LSTMCell, 2, 2), "is a LSTMCell, .*grows with the state"),
    "embedding": (built(nn.Embedding, 2, 2), "is a Embedding, .*token"),
    "own": (
        _seq(Doubled(built(nn.Linear, 2, 2))),
        r"`\.layers\[1\]` is a Doubled, .*lipschitz_bound\.register\(Doubled\)",
    ),
    "lambda": (
        _seq(nn.Lambda(lambda x: 2 * x)),
        r"`\.layers\[1\]\.fn` is the function `<lambda>`, .*`jax\.nn\.relu`",
    ),
    "square": (_seq(nn.Lambda(jnp.square)), "`square`, whose slope has no bound"),
    "partial": (
        nn.Lambda(ft.partial(jnp.clip, min=0.0)),
        r"`\.fn` is a `functools\.partial` of `clip`.*with these arguments",
    ),
    "partial-celu": (ft.partial(jax.nn.celu, alpha=-1.0), "with these arguments"),
    "activation": (
        built(nn.MLP, 2, 2, 2, 1, jnp.exp),
        r"`\.activation` is `exp`, whose slope has no bound",
    ),
    "layer of an MLP": (
        eqx.tree_at(lambda m: m.layers[1], built(nn.MLP, 2, 2, 2, 1), nn.LayerNorm(2)),
        r"`\.layers\[1\]` is a LayerNorm",
    ),
    "pool": (nn.Pool(1, jax.lax.mul, 1, 2), "`operation` other than `lax.max`"),
    "adaptive": (
        nn.AdaptivePool(1, 1, jnp.prod),
        "`operation` other than `jnp.max`",
    ),
    "log_softmax": (_seq(nn.Lambda(jax.nn.log_softmax)), "give `input_shape`"),
    "reflect": (
        built(nn.Conv1d, 1, 1, 3, padding_mode="REFLECT", **_SAME),
        "`padding_mode='REFLECT'`.*give `input_shape`",
    ),
    "circular": (
        built(nn.Conv1d, 1, 1, 3, 2, padding_mode="CIRCULAR", **_SAME),
        "`padding_mode='CIRCULAR'`.*give `input_shape`",
    ),
    "list": ([nn.Identity()], "is a list, for which no Lipschitz bound is known"),
    "shared": (
        nn.Shared(
            (nn.Identity(), built(nn.Linear, 2, 2), built(nn.Linear, 2, 2)),
            lambda m: m[1].weight,
            lambda m: m[2].weight,
        ),
        "is a Shared, .*Call it, and bound what it returns",
    ),
}


@pytest.mark.parametrize("case", UNBOUNDED)
def test_what_has_no_bound_is_named_with_its_place_and_a_remedy(case):
    model, message = UNBOUNDED[case]
    with pytest.raises(ValueError, match=message):
        eqxreg.lipschitz_bound(model)


@pytest.mark.parametrize("shape", [(5,), (2, 5, 5), (3, 5)])
def test_an_input_shape_that_does_not_fit_is_an_error(shape, key):
    layers = [built(nn.Conv1d, 2, 3, 3), nn.Lambda(jnp.ravel)]
    with pytest.raises(ValueError, match=r"`\.layers\[0\]` .*`input_shape`"):
        eqxreg.lipschitz_bound(nn.Sequential(layers), shape)


def test_no_input_within_the_radius_changes_the_class(key):
    rng = np.random.default_rng(1)
    layers = []
    for rows, columns in ((8, 2), (8, 8), (3, 8)):
        layers.extend([orthogonal(rng, rows, columns), eqxreg.MaxMin()])
    model = nn.Sequential(layers[:-1])
    x = jnp.asarray(rng.standard_normal((64, 2)), jnp.float32)
    logits = jax.vmap(model)(x)
    radius = eqxreg.certified_radius(logits, eqxreg.lipschitz_bound(model))
    label = jnp.argmax(logits, axis=-1)

    def margin(x, label):
        logits = model(x)
        others = jnp.where(jnp.arange(3) == label, -jnp.inf, logits)
        return logits[label] - jnp.max(others)

    @jit
    @jax.vmap
    def attack(x, label, radius, start):
        def step(_, moved):
            slope = jax.grad(margin)(x + moved, label)
            moved = moved - 0.2 * radius * slope / (jnp.linalg.norm(slope) + 1e-12)
            return moved * jnp.minimum(1, radius / (jnp.linalg.norm(moved) + 1e-12))

        moved = jax.lax.fori_loop(0, 40, step, 1e-3 * start)
        return margin(x + moved, label)

    start = jax.random.normal(key, x.shape)
    assert jnp.all(attack(x, label, 0.999 * radius, start) > 0)
    # The radius is not idle: somewhat further out, classes do change.
    assert jnp.any(attack(x, label, 4 * radius, start) < 0)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_radius_is_that_of_the_formula_rounded_down(dtype):
    drawn = 10 * np.random.default_rng(0).standard_normal((4, 50, 5))
    logits = jnp.asarray(drawn, dtype)
    radius = eqxreg.certified_radius(logits, 1.7)
    wide = np.sort(np.asarray(logits).astype(np.float64), axis=-1)
    truth = (wide[..., -1] - wide[..., -2]) / (math.sqrt(2) * 1.7)
    assert radius.shape == (4, 50) and radius.dtype == jnp.float32
    assert np.all((truth * (1 - 1e-5) <= radius) & (radius <= truth))


@pytest.mark.usefixtures("x64")
def test_a_radius_of_double_precision_logits_is_in_double_precision():
    logits = jnp.array([1.0, 1.0 + 1e-12])
    radius = eqxreg.certified_radius(logits, jnp.float32(0.5))
    assert radius.dtype == jnp.float64
    margin = float(logits[1]) - 1.0
    np.testing.assert_allclose(radius, margin * math.sqrt(2), rtol=1e-12)
    assert radius <= margin * math.sqrt(2)


def test_a_tie_has_the_radius_zero_and_a_gradient():
    logits = jnp.array([1.0, 1.0, 0.0])
    radius, slope = jax.value_and_grad(eqxreg.certified_radius)(logits, 1.0)
    assert radius == 0
    np.testing.assert_allclose(jnp.linalg.norm(slope), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("logits", "lipschitz", "expected"),
    [
        ([1.0, 0.0], 0.0, jnp.inf),
        ([1.0, 1.0], 0.0, 0.0),
        ([1.0, -jnp.inf], 1.0, jnp.inf),
        ([jnp.inf, 0.0], 1.0, jnp.nan),
        ([jnp.nan, 0.0, 1.0], 1.0, jnp.nan),
        ([1.0, 0.0], jnp.inf, 0.0),
        ([1.0, 0.0], jnp.nan, jnp.nan),
    ],
)
def test_a_radius_is_sound_for_extreme_values(logits, lipschitz, expected):
    radius = eqxreg.certified_radius(jnp.array(logits), jnp.array(lipschitz))
    np.testing.assert_array_equal(radius, expected)


@pytest.mark.parametrize(
    ("logits", "lipschitz", "error", "message"),
    [
        (jnp.ones(()), 1.0, ValueError, r"two classes or more, got shape \(\)"),
        (jnp.ones((3, 1)), 1.0, ValueError, r"two classes or more, got shape \(3, 1\)"),
        (jnp.ones(3, int), 1.0, TypeError, "floating JAX array, got one of int32"),
        (np.ones(3), 1.0, TypeError, "floating JAX array, got a numpy.ndarray"),
        (jnp.ones(3), 0.0, ValueError, r"`lipschitz` must be positive, got 0\.0"),
        (jnp.ones(3), -1, ValueError, "`lipschitz` must be positive, got -1"),
        (jnp.ones(3), math.nan, ValueError, "`lipschitz` must be positive, got nan"),
    ],
)
def test_the_radius_of_what_is_no_logits_is_an_error(logits, lipschitz, error, message):
    with pytest.raises(error, match=message):
        eqxreg.certified_radius(logits, lipschitz)


@pytest.mark.parametrize("shape", [(12,), (12, 5), (12, 3, 4)])
@pytest.mark.parametrize(
    ("layer", "size"), [(eqxreg.MaxMin(), 2), (eqxreg.GroupSort(3), 3)], ids=str
)
def test_groups_of_features_are_sorted(layer, size, shape, key):
    x = jax.random.normal(key, shape)
    grouped = np.asarray(x).reshape(12 // size, size, *shape[1:])
    expected = np.sort(grouped, axis=1).reshape(shape)
    np.testing.assert_array_equal(layer(x, key=key), expected)


@pytest.mark.parametrize("layer", [eqxreg.MaxMin(), eqxreg.GroupSort(4)], ids=str)
def test_sorting_keeps_the_norm_of_a_gradient(layer, key):
    x, cotangent = jax.random.normal(key, (2, 8))
    gradient = jax.vjp(layer, x)[1](cotangent)[0]
    np.testing.assert_array_equal(jnp.sort(gradient), jnp.sort(cotangent))


@pytest.mark.parametrize("layer", [eqxreg.MaxMin(), eqxreg.GroupSort(4)], ids=str)
def test_the_derivative_at_ties_is_an_average_of_permutations(layer):
    jacobian = jit(jax.jacobian(layer))(jnp.zeros(4))
    np.testing.assert_allclose(jnp.sum(jacobian, axis=0), 1)
    np.testing.assert_allclose(jnp.sum(jacobian, axis=1), 1)
    assert jnp.all(jacobian >= 0)


@pytest.mark.parametrize("size", [1, 0, -2, True])
def test_a_group_has_two_features_or_more(size):
    with pytest.raises(ValueError, match="`group_size` must be an int, 2 or more, got"):
        eqxreg.GroupSort(size)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (eqxreg.MaxMin(), (3,), "`MaxMin` .*multiple of 2, .*with 3. Change the width"),
        (eqxreg.GroupSort(4), (6, 4), "`GroupSort` .*multiple of 4, .*with 6"),
        (eqxreg.MaxMin(), (), r"of shape \(\).*`eqx\.nn\.Sequential`"),
    ],
)
def test_features_that_do_not_fill_groups_are_an_error(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        layer(jnp.zeros(shape))
