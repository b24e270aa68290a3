"""A linear map as a pair of functions, itself and its adjoint, with what is found of
it, and vectors to start from."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact, UInt32

from ._norms import squared_magnitude
from ._platforms import on_cpu, read_again
from ._precision import is_half, real_dtype, widen
from ._products import matmul


class LinearMap(NamedTuple):
    """A linear map between vectors, and its adjoint."""

    forward: Callable[[Array], Array]
    adjoint: Callable[[Array], Array]

    @classmethod
    def of(cls, forward: Callable[[Array], Array], vector: Any) -> "LinearMap":
        """A linear function of vectors like this, with the adjoint that JAX finds."""
        pullback = jax.linear_transpose(forward, vector)
        return cls(forward, lambda y: jnp.conj(pullback(jnp.conj(y))[0]))

    @property
    def flipped(self) -> "LinearMap":
        return LinearMap(self.adjoint, self.forward)

    def scaled(self, factor: Float[Array, ""]) -> "LinearMap":
        """The map times a number, which only the vectors are multiplied by."""

        def times(fn: Callable[[Array], Array]) -> Callable[[Array], Array]:
            return lambda x: fn(x * factor.astype(x.dtype))

        return LinearMap(times(self.forward), times(self.adjoint))


class Top(NamedTuple):
    """The largest singular value, or an estimate, with its unit vectors. Of a map that
    is zero, the vectors are zero too."""

    value: Float[Array, ""]
    left: Inexact[Array, " m"]
    right: Inexact[Array, " n"]

    @property
    def flipped(self) -> "Top":
        return Top(self.value, self.right, self.left)


def of_matrix(matrix: Inexact[Array, "m n"]) -> LinearMap:
    """A matrix as a linear map. One in half precision maps vectors in single precision,
    and is read as it is."""
    forward, adjoint = matmul, lambda matrix, u: jnp.conj(matmul(jnp.conj(u), matrix))
    if not is_half(matrix.dtype):
        return LinearMap(ft.partial(forward, matrix), ft.partial(adjoint, matrix))

    def product(fn: Callable, summed: int) -> Callable[[Array], Array]:
        """`fn` of the matrix, as a sum over an axis on CPUs, where a matrix product
        would write a wider copy; a small one does not leave the cache."""

        def by_sum(matrix, v):
            matrix, v = read_again((matrix, jnp.expand_dims(v, 1 - summed)))
            return jnp.sum(widen(matrix) * v, axis=summed)

        by_product = lambda matrix, v: fn(widen(matrix), v)
        if matrix.size < _LARGE:
            return ft.partial(by_product, matrix)
        return ft.partial(on_cpu, by_sum, by_product, matrix)

    return LinearMap(product(forward, 1), product(adjoint, 0))


_LARGE = 2**20
"""From as many entries on a matrix is better not copied."""


def unit(x: Inexact[Array, " n"]) -> tuple[Inexact[Array, " n"], Float[Array, ""]]:
    """`x` at norm one, and its norm, without overflow. Zero stays zero."""
    parts = (lax.real(x), lax.imag(x)) if jnp.iscomplexobj(x) else (x,)
    peaks = [jnp.max(jnp.abs(part), initial=0) for part in parts]
    peak = ft.reduce(jnp.maximum, peaks)
    # Below the normal numbers a division would not be exact enough.
    nonzero = ~(peak < jnp.finfo(peak.dtype).tiny)
    scaled = x / jnp.where(nonzero, peak, 1).astype(x.dtype)
    norm = jnp.sqrt(jnp.sum(squared_magnitude(scaled)))
    norm = jnp.where(nonzero, norm, 1)
    direction = jnp.where(nonzero, scaled / norm.astype(x.dtype), 0)
    return direction, jnp.where(nonzero, norm * peak, 0)


def start_vector(matrix: Inexact[Array, "m n"]) -> Inexact[Array, " n"]:
    """A unit vector to start from, of the matrix's domain."""
    return fixed_vector(matrix.shape[1], matrix.dtype)


def fixed_vector(
    size: int, dtype, seed: UInt32[Array, ""] | int = 0
) -> Inexact[Array, " n"]:
    """A unit vector that is special to no matrix, for it is pseudo-random. No entry is
    small, so that it is far from orthogonal to any axis."""
    bits = _mixed(jnp.arange(size, dtype=jnp.uint32) ^ _mixed(jnp.uint32(seed)))
    # The upper 24 bits, as a number in [-1, 1).
    uniform = (bits >> 8).astype(real_dtype(dtype)) / 2**23 - 1
    entries = uniform + jnp.where(uniform < 0, -1, 1).astype(uniform.dtype)
    return unit(entries.astype(dtype))[0]


def _mixed(x: UInt32[Array, "*n"]) -> UInt32[Array, "*n"]:
    # The finaliser of MurmurHash3, https://github.com/aappleby/smhasher.
    x = x + jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


LinearIn: TypeAlias = Callable[[Array], LinearMap]
"""A linear map that a weight makes, and on which it depends linearly."""


def empty_top(m: int, n: int, dtype) -> Top:
    """That of a map from or to a space of no dimensions, whose norm is zero."""
    zero = jnp.zeros((), real_dtype(dtype))
    return Top(zero, jnp.zeros(m, dtype), jnp.zeros(n, dtype))
