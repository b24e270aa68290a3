"""LAPACK's decompositions, of one matrix after the other where kernels could wait for
ever, and what is divided by matrices."""

import functools as ft
import os
import subprocess
import sys

import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from eqxreg._linalg import _exponential, _lapack
from jax.test_util import check_grads


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(params=[False, True], ids=["at-once", "in-turn"])
def way(request, monkeypatch):
    """Both ways, whatever this version of JAX and this machine need."""
    monkeypatch.setattr(_lapack, "_may_wait", lambda: request.param)
    jax.clear_caches()
    yield
    jax.clear_caches()


def stacks(shape, dtype="complex64", seed=0):
    rng = np.random.default_rng(seed)
    parts = rng.normal(size=(2, *shape))
    complex_ = np.issubdtype(dtype, np.complexfloating)
    return (parts[0] + 1j * parts[1] if complex_ else parts[0]).astype(dtype)


def hermitian(array):
    eye = np.eye(array.shape[-1], dtype=array.dtype)
    return array @ np.conj(np.swapaxes(array, -1, -2)) + eye


def composed(u, s, vh):
    return (u * s[..., None, :].astype(u.dtype)) @ vh


# What is made of a matrix, from its decomposition, and NumPy's.
DECOMPOSITIONS = {
    "eigh": (
        lambda x: (lambda s, v: composed(v, s, v.mT.conj()))(*_lapack.eigh(x)),
        lambda x: x,
    ),
    "eigvalsh": (_lapack.eigvalsh, np.linalg.eigvalsh),
    "thin_svd": (lambda x: composed(*_lapack.thin_svd(x)), lambda x: x),
    "cholesky": (_lapack.cholesky, np.linalg.cholesky),
    "upper_triangle": (
        lambda x: (lambda r: r.mT.conj() @ r)(_lapack.upper_triangle(x)),
        lambda x: np.conj(np.swapaxes(x, -1, -2)) @ x,
    ),
    # The trace of the square is the sum of squares of all entries.
    "tridiagonal": (
        lambda x: (lambda d, e: jnp.sum(d**2, -1) + 2 * jnp.sum(abs(e) ** 2, -1))(
            *_lapack.tridiagonal(x)
        ),
        lambda x: np.sum(abs(x) ** 2, axis=(-2, -1)),
    ),
}


@pytest.mark.parametrize("name", DECOMPOSITIONS)
@pytest.mark.parametrize("batch", [(), (2, 3), (0,)])
def test_decompositions_are_those_of_each_matrix(way, name, batch):
    mine, expected = DECOMPOSITIONS[name]
    square = hermitian(stacks((*batch, 4, 4)))
    found = jax.jit(mine)(square)
    np.testing.assert_allclose(found, expected(square), rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_they_are_under_any_nesting_of_vmap(way, name):
    mine, expected = DECOMPOSITIONS[name]
    square = hermitian(stacks((2, 3, 2, 4, 4), "float32"))
    mapped = jax.vmap(jax.vmap(mine, in_axes=1), in_axes=2)
    found = jax.jit(mapped)(jnp.transpose(square, (1, 2, 0, 3, 4)))
    np.testing.assert_allclose(
        found, expected(np.transpose(square, (0, 2, 1, 3, 4))), rtol=2e-5, atol=2e-4
    )


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("divide", [_lapack.over, _lapack.over_triangle])
def test_what_is_divided_times_the_divisor_is_what_it_was(way, x64, divide, dtype):
    above, below = stacks((2, 5, 4), dtype), hermitian(stacks((2, 4, 4), dtype, 1))
    below = np.triu(below) if divide is _lapack.over_triangle else below
    above, below = jnp.asarray(above), jnp.asarray(below)
    np.testing.assert_allclose(divide(above, below) @ below, above, atol=1e-4)
    # One divisor for several.
    one = jax.vmap(divide, in_axes=(0, None))(above, below[0])
    np.testing.assert_allclose(one @ below[0], above, atol=1e-4)


@pytest.mark.parametrize("divide", [_lapack.over, _lapack.over_triangle])
def test_division_has_derivatives_in_both(way, x64, divide):
    above, below = stacks((2, 3, 4), "float64"), stacks((2, 4, 4), "float64", 1)
    upper = np.triu(below) + 4 * np.eye(4)
    fill = jnp.triu if divide is _lapack.over_triangle else lambda x: x
    mapped = lambda above, below: jax.vmap(divide)(above, fill(below))
    check_grads(mapped, (jnp.asarray(above), jnp.asarray(upper)), order=2)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("size", [1e-8, 0.5, 3.8, 60.0])
def test_the_exponential_is_that_of_scipy(x64, dtype, size):
    square = stacks((3, 7, 7), dtype)
    square = square - np.conj(np.swapaxes(square, -1, -2))
    square = square * np.asarray(size / np.max(np.sum(abs(square), -2)), square.dtype)
    expected = [scipy.linalg.expm(matrix.astype("complex128")) for matrix in square]
    found, _ = jax.jit(_exponential.exponential)(jnp.asarray(square))
    assert found.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(found, np.stack(expected), atol=8 * eps * max(size, 1))


MAPS = {
    "polar": eqxreg.Orthogonal(method="factorisation"),
    "exponential": eqxreg.MatrixExp(),
    "cap": eqxreg.SpectralCap(1.0),
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_of_ensembles_are_the_same_in_turn(monkeypatch, x64, name):
    weights = jnp.asarray(stacks((3, 4, 4), "float64"))
    along = jnp.asarray(stacks((3, 4, 4), "float64", 1))

    def value(weight, along):
        return jnp.sum(MAPS[name](weight) * along)

    def numbers(weight, along):
        return MAPS[name](weight), jax.grad(value)(weight, along)

    found = []
    for in_turn in (False, True):
        monkeypatch.setattr(_lapack, "_may_wait", lambda turn=in_turn: turn)
        jax.clear_caches()
        found.append(jax.jit(jax.vmap(numbers))(weights, along))
    jax.clear_caches()
    for at_once, one in zip(*found, strict=True):
        np.testing.assert_allclose(one, at_once, rtol=1e-9, atol=1e-9)


def test_a_single_matrix_is_no_loop(monkeypatch):
    monkeypatch.setattr(_lapack, "_may_wait", lambda: True)
    for count, loops in ((1, False), (2, True)):
        text = str(jax.make_jaxpr(_lapack.eigvalsh)(jnp.ones((count, 3, 3))))
        assert ("scan" in text) == loops


ENSEMBLE = """
import jax, jax.numpy as jnp, eqxreg

def loss(weights):
    orthogonal = eqxreg.Orthogonal(method="factorisation")
    return sum(jnp.sum(orthogonal(weight)[0]) for weight in weights)

@jax.jit
def descend(weights):
    def step(weights, _):
        slope = jax.grad(lambda ws: jnp.sum(jax.vmap(loss)(ws)))(weights)
        return jax.tree.map(lambda w, s: w - 0.1 * s, weights, slope), None
    return jax.lax.scan(step, weights, None, length=4)[0]

keys = jax.random.split(jax.random.key(0), 4)
weights = [jax.random.normal(key, (2, 96, 96)) for key in keys]
assert all(jnp.all(jnp.isfinite(w)) for w in descend(weights))
print("done")
"""


def test_an_ensemble_on_two_threads_comes_to_an_end():
    environment = {**os.environ, "NPROC": "2", "XLA_FLAGS": ""}
    run = ft.partial(subprocess.run, capture_output=True, text=True, timeout=300)
    ended = run([sys.executable, "-c", ENSEMBLE], env=environment)
    assert ended.stdout == "done\n", ended.stderr
