"""The Lipschitz constants of activations and of other layers without weights are their
largest slopes."""

import functools as ft

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit


pytestmark = pytest.mark.usefixtures("quick_compilation")

nn = eqx.nn


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
