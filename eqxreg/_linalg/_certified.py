r"""The largest singular value to 1e-3, from a vector that may have been good once.

Nothing is promised of that vector $v$. It may be the exact singular vector; or one that
another direction has overtaken, of which its own Krylov space knows nothing; or an
average, or that of another map. So each space that is built has $v$ in it, but grows
from a pseudo-random vector $z$ outside of it: it is a Krylov space of $P A^H A P$ with
$P = I - v v^H$. By Cauchy's interlacing, the largest eigenvalue of that is at least the
second one of $A^H A$: once it is known not to be above that of $v$, only the residual
of $v$ is left to be made small.

It is known by the Lanczos polynomials $p_k$, for which $p_k(P A^H A P)\, z$ is of norm
one. An eigenvalue $\lambda$ whose eigenvector has the share $s$ of $z$ has $|s\,
p_k(\lambda)| \le 1$. Above the eigenvalues of the projected matrix $T_k$, $p_k$ grows:
where it has passed $1 / s$, there is no $\lambda$. It is $\det(\lambda - T_k) /
\prod_j \beta_j$, the product of the pivots of $\lambda - T_k$ over the $\beta_j$, and a
pivot that is not positive tells that an eigenvalue of $T_k$ is above $\lambda$. A bulk
that is well below is dismissed in three steps so, and one that reaches up to $\lambda$
in a few dozen.

??? cite

    [Computing Probabilistic Bounds for Extreme Eigenvalues of Symmetric Matrices with
    the Lanczos Method](https://doi.org/10.1137/S0895479800372821), van Dorsselaer,
    Hochstenbach and van der Vorst, 2000.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Inexact, Int, UInt32

from ._batching import anywhere
from ._estimators import extended, outside, top_eigenvector
from ._linear_map import LinearMap, Top, empty_top, fixed_vector, unit
from ._products import matmul


_CLOSE = 5e-4
"""How much above the value of the vector found another may be, relatively."""

_RARE = 1e-4
"""The share of the pseudo-random vector, in units of the average one, that a direction
has at least, or it may be missed: of random ones, one in ten thousand."""

_LARGEST = 80
"""The dimension up to which a space is explored. Where singular values crowd at the top
so that this is not enough, the result is less certain, and the value close all the
same."""

_SMALL = 16
"""The dimension up to which most spaces come."""

_POLISHED = 8
"""The dimension of the spaces that only refine the vector."""


class _Found(NamedTuple):
    """A unit vector of the domain, how it is stretched, and what comes back."""

    right: Inexact[Array, " n"]
    left: Inexact[Array, " m"]
    value: Float[Array, ""]
    image: Inexact[Array, " n"]

    @classmethod
    def of(cls, linear: LinearMap, right: Inexact[Array, " n"]) -> "_Found":
        left, value = unit(linear.forward(right))
        return cls(right, left, value, linear.adjoint(left))

    @property
    def rest(self) -> Inexact[Array, " n"]:
        """What keeps the vector from being a singular one."""
        return self.image - self.value.astype(self.image.dtype) * self.right


def settled(
    linear: LinearMap,
    start: Inexact[Array, " n"],
    *,
    enough: ArrayLike = 0.0,
    tol: float = 1e-3,
    cycles: int = 8,
) -> Top:
    r"""The largest singular value, to a relative error of 1e-3, from any vector.

    From a good vector it takes 12 products where all other singular values are less
    than half as large, 35 where they come within a tenth, and about 160 where they
    crowd at the top. Where the vector is not good, it takes 50 to 150 more.

    **Arguments:**

    - `linear`: the map.
    - `start`: a vector of its domain. It need not be of norm one, nor finite.
    - `enough`: a norm up to which nothing need be known: below it, the value may be
        less than the truth.
    - `tol`: the residual $\lVert A^H u - \sigma v \rVert / \sigma$ to stop at.
    - `cycles`: the largest number of spaces to build.

    **Returns:**

    An estimate that is not above the truth, but for rounding, and the same in every
    call.
    """
    image = jax.eval_shape(linear.forward, start)
    if start.size == 0 or image.size == 0:
        return empty_top(image.size, start.size, start.dtype)
    start = _usable(start)
    if image.size < start.size:
        # The side with fewer dimensions is exhausted sooner.
        start = linear.forward(start)
        return settled(
            linear.flipped, start, enough=enough, tol=tol, cycles=cycles
        ).flipped

    def cycle(carry):
        count, is_known, found = carry
        sought = jnp.maximum(found.value * (1 + _CLOSE), enough)
        seed = _seed(found.right)
        other = jnp.where(is_known, 0, fixed_vector(start.size, start.dtype, seed))
        other = other + unit(found.rest)[0]
        limit = jnp.where(is_known, _POLISHED, _LARGEST)
        right, is_top = _explored(
            linear, found, other, sought, limit, _SMALL * 2**count
        )
        return count + 1, is_known | is_top, _Found.of(linear, right)

    def unfinished(carry):
        count, is_known, found = carry
        residual = unit(found.rest)[1]
        slack = jnp.maximum(tol * found.value, (enough - found.value) / 2)
        going_on = ~is_known | (residual > slack)
        return jnp.isfinite(found.value) & (count < cycles) & going_on

    first = _Found.of(linear, start)
    carry = jnp.zeros((), jnp.int32), jnp.zeros((), bool), first
    _, _, found = lax.while_loop(unfinished, cycle, carry)
    # Half a step of power iteration more.
    right, value = unit(found.image)
    return Top(value, found.left, right)


def _usable(start: Inexact[Array, " n"]) -> Inexact[Array, " n"]:
    """A vector at norm one; if that cannot be, another one."""
    start = unit(jnp.where(jnp.all(jnp.isfinite(start)), start, 0))[0]
    other = fixed_vector(start.size, start.dtype)
    return jnp.where(jnp.any(start != 0), start, other)


def _seed(v: Inexact[Array, " n"]) -> UInt32[Array, ""]:
    """A number that differs with the vector, so that the directions which pseudo-random
    vectors hardly reach are others for each."""
    parts = lax.real(v) if jnp.iscomplexobj(v) else v
    bits = lax.bitcast_convert_type(parts.astype(jnp.float32), jnp.uint32)
    return jnp.sum(bits, dtype=jnp.uint32)


class _Exploration(NamedTuple):
    """A space, and what its Lanczos polynomial says of a number."""

    steps: Int[Array, ""]
    basis: Inexact[Array, "k n"]
    following: Inexact[Array, " n"]
    lengths: Float[Array, " k"]
    """The norms of what the map makes of the basis."""
    news: Float[Array, " k"]
    r"""The $\beta$, each over the length."""
    pivot: Float[Array, ""]
    coupling: Float[Array, ""]
    r"""The square of the last $\beta$, in units of the number."""
    growth: Float[Array, ""]
    """The logarithm of the polynomial."""
    is_passed: Bool[Array, ""]
    """Whether there are values above the number."""


def _explored(
    linear: LinearMap,
    found: _Found,
    other: Inexact[Array, " n"],
    sought: Float[Array, ""],
    limit: Int[Array, ""],
    patience: Int[Array, ""],
) -> tuple[Inexact[Array, " n"], Bool[Array, ""]]:
    """The unit vector stretched most, of a space that has `found` and grows from
    `other`; and whether no value but that of one vector is above `sought`. If some are,
    the space is given up at the dimension `patience`."""
    n = found.right.size
    size = min(_LARGEST, n)
    needed = math.log(math.sqrt(2 * n) / _RARE)
    dtype = found.value.dtype

    def relative(norm: Array) -> Array:
        ratio = norm / jnp.where(sought > 0, sought, 1)
        # Far above is all that need be known.
        return jnp.minimum(jnp.where(sought > 0, ratio, 1e3), 1e3)

    def extend(at: _Exploration) -> _Exploration:
        j = at.steps + 1
        basis, _, following, length, new = extended(linear, at.basis, j, at.following)
        stretch = relative(length)
        beta = stretch * relative(new)
        pivot = 1 - stretch**2 - at.coupling / at.pivot
        is_passed = at.is_passed | ~(pivot > 0)
        pivot = jnp.where(is_passed, 1, pivot)
        growth = jnp.log(pivot / jnp.maximum(beta, jnp.finfo(dtype).tiny))
        return _Exploration(
            steps=j,
            basis=basis,
            following=following,
            lengths=at.lengths.at[j].set(length),
            news=at.news.at[j].set(new),
            pivot=pivot,
            coupling=beta**2,
            growth=at.growth + growth,
            is_passed=is_passed,
        )

    def goes_on(at: _Exploration) -> Bool[Array, ""]:
        some_left = (at.steps < jnp.minimum(limit, size)) & jnp.any(at.following != 0)
        is_hopeful = jnp.where(at.is_passed, at.steps < patience, at.growth < needed)
        return some_left & is_hopeful

    basis = jnp.zeros((size + 1, n), found.right.dtype).at[0].set(found.right)
    nothing = jnp.zeros(size + 1, dtype)
    zero, one = nothing[0], jnp.ones((), dtype)
    at = _Exploration(
        steps=jnp.zeros((), jnp.int32),
        basis=basis,
        following=outside(basis, unit(other)[0])[0],
        lengths=nothing.at[0].set(found.value),
        news=nothing,
        pivot=one,
        coupling=zero,
        growth=zero,
        is_passed=jnp.zeros((), bool),
    )
    at = lax.while_loop(goes_on, extend, at)
    return _stretched_most(found, at), ~at.is_passed


def _stretched_most(found: _Found, at: _Exploration) -> Inexact[Array, " n"]:
    """The unit vector of the space that is stretched most. What $A^H A$ is on it is
    known: tridiagonal, but for the coupling to the vector that was found."""
    scale = jnp.max(at.lengths)
    scale = jnp.where(scale > 0, scale, 1)
    lengths, news = at.lengths / scale, at.news / scale
    betas = jnp.where(
        jnp.arange(len(news), dtype=jnp.int32) < at.steps, lengths * news, 0
    )[:-1]
    image = found.image / scale.astype(found.image.dtype)
    couplings = lengths[0].astype(image.dtype) * matmul(jnp.conj(at.basis), image)
    couplings = couplings.at[0].set(0)
    projected = jnp.diag(lengths**2) + jnp.diag(betas, 1) + jnp.diag(betas, -1)
    projected = projected.astype(image.dtype)
    projected = projected.at[:, 0].add(couplings).at[0].add(jnp.conj(couplings))
    small = min(_SMALL + 1, len(news))

    def of_small(projected: Array) -> Array:
        weights = top_eigenvector(projected[:small, :small])
        return jnp.pad(weights, (0, len(news) - small))

    is_large = anywhere(at.steps >= small)
    weights = lax.cond(is_large, top_eigenvector, of_small, projected)
    return unit(matmul(weights, at.basis))[0]
