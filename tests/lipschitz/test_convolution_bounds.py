"""Lipschitz bounds of convolutions and pools are never below the norms of their dense
Jacobians, and near them."""

import math

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jacobians import built, dense_norm, linear_norm
from quick import jit


pytestmark = pytest.mark.usefixtures("quick_compilation")

nn = eqx.nn

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
