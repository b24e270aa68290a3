"""Matrices with known singular values, the maps of singular values, and numpy to
compare them with."""

import functools as ft

import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit
from tables import exact, sample


WAYS = ("factorisation", "products")


def orthogonal(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def with_spectrum(values, rows):
    """A matrix with these singular values."""
    values = np.asarray(values)
    left = orthogonal(rows)[:, : values.size]
    return (left * values) @ orthogonal(values.size, 1).T


def singular_values(weight):
    matrix = exact(weight).reshape(weight.shape[0], -1)
    return np.linalg.svd(matrix, compute_uv=False)


def function_of(weight, fn):
    """The weight with `fn` of its singular values."""
    u, s, vh = np.linalg.svd(exact(weight), full_matrices=False)
    return (u * fn(s)) @ vh


# The square ones share a shape, and what is compiled for it.
MATRICES = {
    "row": sample("float32", shape=(1, 50)),
    "column": sample("float32", shape=(50, 1)),
    "tall": sample("float32", shape=(200, 40)),
    "wide": sample("float32", shape=(40, 200)),
    "square": sample("float32", 0.1, shape=(48, 48)),
    "fast decay": jnp.asarray(with_spectrum(3 * 0.8 ** np.arange(48), 48), "float32"),
    "ties": jnp.asarray(with_spectrum([2.0] * 24 + [0.5] * 24, 48), "float32"),
    "rank three": jnp.asarray(with_spectrum([3, 2, 1] + [0] * 45, 48), "float32"),
    "orthogonal": jnp.asarray(orthogonal(48), "float32"),
    "identity": jnp.eye(48),
}
each_matrix = pytest.mark.parametrize("name", list(MATRICES))


@ft.cache
def compiled(p):
    """As users compile it, for its bits."""
    return jax.jit(lambda weight: p(weight))


MAPS = {
    "norm": eqxreg.SpectralNorm(),
    "scale": eqxreg.SpectralScale(),
    "cap": eqxreg.SpectralCap(),
    "cap-products": eqxreg.SpectralCap(0.5, method="products"),
    "orthogonal": eqxreg.Orthogonal(),
    "orthogonal-products": eqxreg.Orthogonal(method="products"),
    "almost": eqxreg.AlmostOrthogonal(),
    "cayley": eqxreg.Cayley(),
    "exp": eqxreg.MatrixExp(),
}


@ft.cache
def mapped(name):
    return jit(lambda weight: MAPS[name](weight))
