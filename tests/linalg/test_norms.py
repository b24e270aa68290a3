"""Norms by both ways, that of CPUs and TPUs and that of GPUs, against numpy in extended
precision; and what is read and written for those of half precision."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqxreg._linalg import _norms, of_matrix, scaled_norm
from hlo import counts_of_today, program_of
from quick import jit


WAYS = {"cases": _norms._norm_by_cases, "at once": _norms._norm_at_once}
SIZES = {
    "float16": [6e4, 1.0, 1e-7],
    "bfloat16": [1e38, 1e20, 1.0, 1e-20, 1e-37],
    "float32": [3e38, 1e25, 1.0, 1e-25, 1e-37],
    "float64": [1e308, 1e200, 1.0, 1e-200, 1e-307],
    "complex64": [1e38, 1e25, 1.0, 1e-25],
}
CASES = [(dtype, size) for dtype, sizes in SIZES.items() for size in sizes]


@ft.cache
def compiled(way, axes):
    return jit(lambda weight: WAYS[way](weight, axes))


def truth(weight, axes):
    magnitude = np.abs(np.asarray(weight).astype(np.clongdouble))
    return np.sqrt(np.sum(magnitude**2, axis=axes, keepdims=True))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("axes", [(), (1,), (0, 1), (0,)])
@pytest.mark.parametrize("dtype, size", CASES)
@pytest.mark.parametrize("way", list(WAYS))
def test_norms_of_every_size_are_right(way, dtype, size, axes):
    entries = np.random.default_rng(0).uniform(0.5, 1, (6, 5))
    weight = jnp.asarray(size * entries, dtype)
    norm, scale = compiled(way, axes)(weight)
    found = np.asarray(norm).astype(np.longdouble) / np.asarray(scale)
    rtol = 1e-14 if dtype == "float64" else 1e-6
    np.testing.assert_allclose(found, truth(weight, axes), rtol=rtol)


@pytest.mark.parametrize("way", list(WAYS))
def test_slices_of_every_size_at_once(way):
    sizes = np.array([1e25, 0.0, 1.0, 1e-25, 3e38])[:, None]
    weight = jnp.asarray(sizes * np.linspace(0.5, 1, 7), jnp.float32)
    norm, scale = compiled(way, (1,))(weight)
    found = np.asarray(norm, np.float64) / np.asarray(scale, np.float64)
    np.testing.assert_allclose(found, truth(weight, (1,)).astype(float), rtol=1e-6)


@pytest.mark.parametrize("fault", [np.nan, np.inf])
@pytest.mark.parametrize("way", list(WAYS))
def test_faults_stay_visible(way, fault):
    weight = jnp.ones((3, 4)).at[1, 2].set(fault)
    norm, _ = compiled(way, (1,))(weight)
    assert np.array_equal(np.isfinite(norm[:, 0]), [True, False, True])


SIZE = 1024
WEIGHT = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.bfloat16)


def read_and_written(fn, *args):
    """What a program accesses, and what it writes for itself, in weights."""
    program = program_of(fn, *args)
    counted = program.cost_analysis()["bytes accessed"]
    temporary = program.memory_analysis().temp_size_in_bytes
    return counted / (2 * SIZE * SIZE), temporary / (2 * SIZE * SIZE)


@counts_of_today
def test_a_norm_in_half_precision_writes_no_wider_copy():
    # Once, and once more in the branch for what is out of range.
    passes, temporary = read_and_written(lambda w: scaled_norm(w, (1,)), WEIGHT)
    assert passes <= 2.1 and temporary <= 0.01


@counts_of_today
def test_a_power_step_in_half_precision_writes_no_wider_copy():
    def step(weight, v):
        linear = of_matrix(weight)
        return linear.adjoint(linear.forward(v))

    vector = jax.ShapeDtypeStruct((SIZE,), jnp.float32)
    passes, temporary = read_and_written(step, WEIGHT, vector)
    assert passes <= 2.1 and temporary <= 0.01


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(40, 30), (1024, 1030)])
def test_a_matrix_in_half_precision_maps_as_in_double(dtype, shape):
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(rng.normal(size=shape), dtype)
    v = jnp.asarray(rng.normal(size=shape[1]), jnp.float32)
    linear, exact = of_matrix(matrix), np.asarray(matrix, np.float64)
    u = jit(linear.forward)(v)
    assert u.dtype == jnp.float32
    np.testing.assert_allclose(u, exact @ np.asarray(v, np.float64), atol=1e-4)
    back = exact.T @ np.asarray(u, np.float64)
    np.testing.assert_allclose(jit(linear.adjoint)(u), back, atol=2e-2, rtol=1e-5)
