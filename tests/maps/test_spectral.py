"""Spectral maps against the singular value decomposition in double precision, and at
the points where they are awkward."""

import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import check_derivatives, jit
from spectra import (
    MAPS,
    MATRICES,
    WAYS,
    compiled,
    each_matrix,
    function_of,
    orthogonal,
    singular_values,
)
from tables import exact, sample


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("way", WAYS)
@each_matrix
def test_the_cap_lowers_singular_values_and_leaves_the_others(name, way):
    weight = MATRICES[name]
    p = compiled(eqxreg.SpectralCap(0.7, method=way))
    result = p(weight)
    expected = function_of(weight, lambda s: np.minimum(s, 0.7))
    np.testing.assert_allclose(result, expected, atol=5e-5 * 0.7)
    assert singular_values(result)[0] <= 0.7
    assert jnp.array_equal(p(result), result)


@pytest.mark.parametrize("way", WAYS)
def test_a_cap_far_below_the_norm_is_as_exact(way):
    weight = sample("float32", 5.0, shape=(96, 96))
    result = jit(eqxreg.SpectralCap(1.0, method=way))(weight)
    np.testing.assert_allclose(singular_values(result)[:80], 1.0, rtol=2e-5)


def test_large_matrices_are_as_exact():
    weight = sample("float32", 1 / 32, shape=(1024, 1024))
    u, s, vh = np.linalg.svd(exact(weight))
    orthogonal = jax.jit(eqxreg.Orthogonal())(weight)
    np.testing.assert_allclose(orthogonal, u @ vh, atol=1e-4)
    gram_matrix = exact(orthogonal).T @ exact(orthogonal)
    assert np.linalg.norm(gram_matrix - np.eye(1024), 2) <= 1e-5
    capped = jax.jit(eqxreg.SpectralCap(1.0))(weight)
    np.testing.assert_allclose(capped, (u * np.minimum(s, 1)) @ vh, atol=1e-4)


AWKWARD = {
    "zero": jnp.zeros((5, 5)),
    "identity": jnp.eye(5),
    "orthogonal": jnp.asarray(orthogonal(5), "float32"),
    "ones": jnp.ones((5, 5)),
    "one row": jnp.zeros((5, 5)).at[1].set(2.0),
}


@pytest.mark.parametrize(
    "name, dtype",
    [*((name, "float32") for name in MAPS), ("cap", "bfloat16"), ("norm", "bfloat16")],
)
def test_awkward_weights_have_finite_values_and_gradients(name, dtype):
    @jit
    def value_and_gradient(weight):
        value, pullback = jax.vjp(MAPS[name], weight)
        return value, pullback(jnp.ones_like(value))[0]

    # One shape, one program.
    for weight in AWKWARD.values():
        value, gradient = value_and_gradient(weight.astype(dtype))
        assert jnp.all(jnp.isfinite(value))
        assert jnp.all(jnp.isfinite(gradient)) and jnp.max(jnp.abs(gradient)) < 1e4


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", list(MAPS))
def test_derivatives_match_finite_differences(name):
    weight = sample("float64", shape=(6, 4), seed=5)
    check_derivatives(MAPS[name], (weight,), eps=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["norm", "cap", "orthogonal", "almost"])
def test_a_wide_weight_is_mapped_as_its_transpose_is(name):
    @jit
    def value_and_gradient(weight, cotangent):
        value, pullback = jax.vjp(MAPS[name], weight)
        return value, pullback(cotangent)[0]

    weight, cotangent = sample("float64", shape=(2, 6, 4), seed=5)
    tall = value_and_gradient(weight, cotangent)
    wide = value_and_gradient(weight.T, cotangent.T)
    np.testing.assert_allclose(wide[0], tall[0].T, atol=1e-10)
    np.testing.assert_allclose(wide[1], tall[1].T, atol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["norm", "cap", "orthogonal"])
def test_complex_derivatives_match_finite_differences(name):
    def parts(real, imag):
        result = MAPS[name](jax.lax.complex(real, imag))
        return result.real, result.imag

    real, imag = (sample("float64", shape=(4, 3), seed=i) for i in range(2))
    check_derivatives(parts, (real, imag), eps=1e-5)


BLOCKWISE = {
    "norm": (eqxreg.SpectralNorm(0.5, blocks=3), lambda s: 0.5 * s / s[0]),
    "scale": (eqxreg.SpectralScale(0.5, blocks=3), lambda s: s * min(1, 0.5 / s[0])),
    "cap": (eqxreg.SpectralCap(0.5, blocks=3), lambda s: np.minimum(s, 0.5)),
    "orthogonal": (eqxreg.Orthogonal(blocks=3), np.ones_like),
}


@pytest.mark.parametrize("name", list(BLOCKWISE))
def test_blocks_are_matrices_of_their_own(name):
    p, fn = BLOCKWISE[name]
    scales = jnp.asarray([0.01, 1.0, 10.0])[:, None, None]
    weight = (sample("float32", shape=(3, 4, 6)) * scales).reshape(12, 6)
    blocks = np.split(np.asarray(jit(p)(weight)), 3)
    for block, raw in zip(blocks, np.split(np.asarray(weight), 3), strict=True):
        np.testing.assert_allclose(block, function_of(raw, fn), atol=1e-5)


@pytest.mark.parametrize("matrix", [1, (0, 2), -1])
def test_any_axes_may_be_the_rows(matrix):
    weight = sample("float32", shape=(4, 3, 5))
    axes = tuple(a % 3 for a in (matrix if isinstance(matrix, tuple) else (matrix,)))
    others = [a for a in range(3) if a not in axes]
    rows = int(np.prod([weight.shape[a] for a in axes]))
    as_matrix = np.transpose(weight, (*axes, *others)).reshape(rows, -1)
    result = eqxreg.Orthogonal(matrix=matrix)(weight)
    result = np.transpose(result, (*axes, *others)).reshape(rows, -1)
    np.testing.assert_allclose(result, function_of(as_matrix, np.ones_like), atol=1e-5)


ERRORS = [
    (lambda: eqxreg.SpectralNorm(0.0), "`norm` must be positive"),
    (lambda: eqxreg.SpectralCap(-1.0), "`cap` must be positive"),
    (lambda: eqxreg.SpectralScale(jnp.nan), "`cap` must be positive"),
    (lambda: eqxreg.Orthogonal(blocks=0), "`blocks` must be a positive int"),
    (lambda: eqxreg.Orthogonal(matrix="rows"), "`matrix` says which axes"),
    (lambda: eqxreg.Orthogonal(blocks=4)(jnp.ones((6, 2))), "must divide the 6 rows"),
    (lambda: eqxreg.SpectralCap()(jnp.ones(3)), "rank 2 or more"),
    (lambda: eqxreg.spectral_norm(jnp.ones(3)), "rank 2 or more"),
]


@pytest.mark.parametrize("build, message", ERRORS, ids=[e[1] for e in ERRORS])
def test_mistakes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
