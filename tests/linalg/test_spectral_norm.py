"""Estimates of the largest singular value and their gradients, against the singular
value decomposition in double precision."""

import functools as ft

import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqxreg._linalg import gram, lanczos, of_matrix
from eqxreg._linalg._linear_map import start_vector
from quick import jit
from spectra import MATRICES, each_matrix, mapped, singular_values
from tables import exact, sample


pytestmark = pytest.mark.usefixtures("quick_compilation")


@ft.cache
def estimate(method):
    return jit(ft.partial(eqxreg.spectral_norm, method=method))


@each_matrix
def test_estimates_of_the_largest_singular_value_agree_with_the_svd(name):
    weight = MATRICES[name]
    expected = singular_values(weight)[0]
    estimates = {
        method: float(estimate(method)(weight)) for method in ("lanczos", "gram", "svd")
    }
    assert estimates["lanczos"] == pytest.approx(expected, rel=1e-4)
    assert estimates["svd"] == pytest.approx(expected, rel=1e-6)
    # It certifies.
    assert expected <= estimates["gram"] <= expected * (1 + 1e-4)


def test_one_krylov_space_is_enough_for_a_large_gaussian_matrix():
    weight = sample("float32", shape=(1024, 1024))
    start = start_vector(weight)
    # In numpy, the values alone, by the symmetric product, for speed.
    expected = np.sqrt(np.linalg.eigvalsh(exact(weight).T @ exact(weight))[-1])
    once = jit(lambda w: lanczos(of_matrix(w), start, cycles=1).value)(weight)
    assert float(once) == pytest.approx(expected, rel=1e-3)
    value = singular_values(jit(eqxreg.SpectralNorm(0.5))(weight))[0]
    assert value == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("method", ["lanczos", "gram", "svd"])
def test_the_gradient_of_the_largest_singular_value_is_an_outer_product(method):
    weight = sample("float32", shape=(7, 5))
    u, _, vh = np.linalg.svd(exact(weight))
    gradient = jax.grad(ft.partial(eqxreg.spectral_norm, method=method))
    np.testing.assert_allclose(
        jit(gradient)(weight), np.outer(u[:, 0], vh[0]), atol=1e-4
    )


@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
def test_complex_singular_values_conjugate(shape):
    weight = sample("complex64", shape=shape)
    expected = np.linalg.svd(exact(weight), compute_uv=False)[0]
    for method in ("lanczos", "gram", "svd"):
        value = estimate(method)(weight)
        assert float(value) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("fault", [jnp.nan, jnp.inf])
def test_faults_in_a_weight_stay_visible_in_every_estimate(fault):
    weight = sample("float32", shape=(4, 3)).at[1, 1].set(fault)
    assert not jnp.isfinite(jit(lambda weight: gram(weight).value)(weight))
    for method in ("lanczos", "svd"):
        assert not jnp.isfinite(estimate(method)(weight))
    for name in ("cap", "cap-products", "orthogonal", "orthogonal-products"):
        assert not jnp.all(jnp.isfinite(mapped(name)(weight)))
