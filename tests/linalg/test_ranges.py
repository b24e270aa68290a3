"""Largest singular values of weights at both ends of the range of numbers, and of wide
ones, against numpy in double precision or more."""

import functools as ft

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit


pytestmark = pytest.mark.usefixtures("quick_compilation")

# By dtype, sizes of entries. Those of a weight of the smallest are partly subnormal.
SIZES = {
    "bfloat16": [1e-35, 1e-20, 1e20, 1e36, 3e37],
    "float32": [1e-36, 1e-33, 1e-30, 1e-20, 1e20, 1e30, 1e33, 1e36, 1e37, 3e37, 3e38],
    "float64": [1e-303, 1e-300, 1e-250, 1e250, 1e300, 1e305, 1e307, 1.7e308],
}
CASES = [(dtype, size) for dtype, sizes in SIZES.items() for size in sizes]
SHAPE = (40, 50)
TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-3, "float64": 1e-3}

each_case = pytest.mark.parametrize("dtype, size", CASES)
each_method = pytest.mark.parametrize("method", ["lanczos", "gram", "svd"])


def sized(dtype, size):
    """With the largest entry at `size`."""
    entries = np.random.default_rng(0).uniform(-1, 1, SHAPE)
    entries *= 1 / np.abs(entries).max()
    return jnp.asarray(entries * size, dtype)


def exact_norm(weight):
    """In extended precision, whose range is larger than that of all the others."""
    wide = np.asarray(weight).astype(np.longdouble)
    scale = np.ldexp(np.longdouble(1), int(np.frexp(np.max(np.abs(wide)))[1]))
    return np.longdouble(np.linalg.norm((wide / scale).astype(np.float64), 2)) * scale


@ft.cache
def mapped(layer, method):
    p = layer(method=method)
    return jit(lambda weight: p(weight))


@ft.cache
def norm_by(method):
    return jit(lambda weight: eqxreg.spectral_norm(weight, method=method))


def largest(dtype):
    return np.longdouble(float(jnp.finfo(dtype).max))


@pytest.mark.usefixtures("x64")
@each_method
@each_case
def test_the_spectral_norm_is_right_or_infinite(dtype, size, method):
    weight = sized(dtype, size)
    norm = norm_by(method)(weight)
    truth = exact_norm(weight)
    if truth > largest(dtype):
        assert jnp.isposinf(norm)
    else:
        ratio = np.longdouble(float(norm)) / truth
        assert float(ratio) == pytest.approx(1, rel=TOLERANCE[dtype])


@pytest.mark.usefixtures("x64")
@each_method
@pytest.mark.parametrize("layer", [eqxreg.SpectralNorm, eqxreg.SpectralScale])
@each_case
def test_a_scaled_weight_is_right_or_visibly_not(dtype, size, layer, method):
    weight = sized(dtype, size)
    result = mapped(layer, method)(weight)
    info = jnp.finfo("float64" if dtype == "float64" else "float32")
    truth = exact_norm(weight)
    if truth > 1.01 / float(info.tiny):
        assert jnp.all(jnp.isnan(result))
    elif truth < 0.99 / float(info.tiny):
        if layer is eqxreg.SpectralScale and size < 1:
            assert jnp.array_equal(result, weight)
        else:
            norm = float(exact_norm(result))
            assert norm == pytest.approx(1, rel=TOLERANCE[dtype])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", ["factorisation", "products"])
@each_case
def test_the_cap_is_right_at_every_size(dtype, size, method):
    weight = sized(dtype, size)
    result = mapped(eqxreg.SpectralCap, method)(weight)
    if size < 1:
        assert jnp.array_equal(result, weight)
    else:
        # The smallest singular value is still far above the bound.
        values = np.linalg.svd(np.asarray(result).astype(np.float64), compute_uv=False)
        slack = float(jnp.finfo(dtype).eps)
        assert values[0] <= 1 + (slack if dtype == "bfloat16" else 0)
        np.testing.assert_allclose(values, 1, rtol=20 * max(slack, 1e-5))


@pytest.mark.parametrize("size", [3e37, 3e38])
def test_a_stateful_wrapper_of_a_weight_out_of_range_is_visibly_wrong(size, key):
    weight = sized("float32", size)
    linear = eqx.nn.Linear(50, 40, use_bias=False, key=key)
    linear = eqx.tree_at(lambda layer: layer.weight, linear, weight)
    make = eqx.nn.make_with_state(eqxreg.SpectralNormConstraint)
    layer, state = make(linear, "weight", key=key)
    output, _ = layer(jnp.full(50, 1e-3), state)
    assert jnp.all(jnp.isnan(output))


def test_gradients_of_weights_out_of_range_are_visible_too():
    weight = sized("float32", 3e38)
    gradient = jax.grad(lambda w: jnp.sum(eqxreg.SpectralNorm()(w)))(weight)
    assert not jnp.any(jnp.isfinite(gradient))


@pytest.mark.parametrize("fault", [jnp.nan, jnp.inf])
@each_method
def test_faults_in_a_weight_stay_visible_when_it_is_scaled(fault, method):
    weight = sized("float32", 1.0).at[3, 2].set(fault)
    for layer in (eqxreg.SpectralNorm, eqxreg.SpectralScale):
        assert not jnp.all(jnp.isfinite(mapped(layer, method)(weight)))


def test_a_stack_with_weights_of_every_size_is_right():
    sizes = [1e-33, 0.0, 1e36, 1.0]
    stack = jnp.stack([sized("float32", size) for size in sizes])
    results = jit(jax.vmap(eqxreg.SpectralNorm()))(stack)
    for size, result in zip(sizes, results, strict=True):
        norm = np.linalg.norm(np.asarray(result, np.float64), 2)
        assert norm == pytest.approx(float(size > 0), rel=1e-3)


# From the formula of the margin, and what its last squaring may be off.
ABOVE = {256: 5.2e-5, 1024: 6.7e-5, 4096: 9.8e-5, 16_384: 1.6e-4, 65_536: 2.9e-4}


@pytest.mark.parametrize("kind", ["diagonal", "gaussian"])
@pytest.mark.parametrize("width", list(ABOVE))
def test_gram_iteration_is_above_the_truth_by_what_the_text_says(width, kind):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, width))
    if kind == "diagonal":
        weight *= 1e-4
        weight[range(4), range(0, width, width // 4)] = [3.0, 2.0, 1.0, 0.5]
    weight = weight.astype(np.float32)
    truth = np.linalg.norm(weight.astype(np.float64), 2)
    norm = float(eqxreg.spectral_norm(jnp.asarray(weight), method="gram"))
    assert 0 <= norm / truth - 1 <= ABOVE[width]
    linear = eqx.nn.Linear(width, 4, use_bias=False, key=jax.random.key(0))
    linear = eqx.tree_at(lambda m: m.weight, linear, jnp.asarray(weight))
    assert 0 <= float(eqxreg.lipschitz_bound(linear)) / truth - 1 <= ABOVE[width]
