r"""How far the singular values of a matrix are above a bound, without its vectors.

The distance of a matrix to those with no singular value above $c$ is
$\bigl(\sum_i (\sigma_i - c)_+^2\bigr)^{1/2}$. The singular values are the roots of the
eigenvalues of the smaller Gram matrix, which LAPACK makes tridiagonal. Those above
$c^2$ are then found by bisection, all at once: the signs of the pivots of $T - x$ count
the eigenvalues above $x$. That is a third of the time of a decomposition.

??? cite

    [Calculation of the Eigenvalues of a Symmetric Tridiagonal Matrix by the Method of
    Bisection](https://doi.org/10.1007/BF02162154), Barth, Martin and Wilkinson, 1967.
"""

import functools as ft
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact

from ._lapack import tridiagonal
from ._newton_schulz import compiled, normal_range
from ._precision import widen
from ._products import Matrices, adjoint, gram_of


_FAR = 16
"""How many times the bound the largest may be. The eigenvalues are exact to a few
roundings of the largest, so a singular value of $c$ to $\\sigma_1^2 / 2 c^2$ times
that, and the distance, which is at least $\\sigma_1 - c$, to a few times 1e-5 in single
precision, at most."""


class Excess(NamedTuple):
    """What is known of each of some matrices without their singular vectors."""

    distance: Float[Array, " blocks"]
    """The Frobenius distance to the matrices with no singular value above the bound."""
    is_near: Bool[Array, " blocks"]
    """Whether any singular value is above the bound or close to it."""
    is_sure: Bool[Array, " blocks"]
    """Whether the distance is exact, and all rows and columns that are not zero have a
    share in those singular values, if there are any. They might not in a matrix that
    falls into parts; and others for which that is not so are exceptions."""


@ft.partial(compiled, static_argnames="slack")
def excess(matrices: Matrices, bound: Float[Array, ""], slack: float) -> Excess:
    """What matrices have above a bound, where `slack` is how much a singular value may
    be below it, relatively, and be close to it."""
    wide = widen(matrices)
    tall = adjoint(wide) if wide.shape[-2] < wide.shape[-1] else wide
    finite = jnp.all(jnp.isfinite(tall), axis=(-1, -2), keepdims=True)
    scaled, scale = normal_range(jnp.where(finite, tall, 0))
    gram = gram_of(scaled)
    scale, finite = scale[..., 0, 0], finite[..., 0, 0]
    bounds = bound.astype(scale.dtype) * scale
    low = bounds / (1 + slack)
    values = jax.vmap(_values_above)(gram, low)
    beyond = jnp.maximum(values - bounds[:, None], 0)
    distance = jnp.sqrt(jnp.sum(beyond**2, axis=-1)) / scale
    is_near, all_near = values[:, 0] > low, values[:, -1] > low
    shared = jax.vmap(_is_connected)(gram) | all_near | ~is_near
    return Excess(distance, is_near, finite & (values[:, 0] <= _FAR * low) & shared)


def _values_above(
    gram: Inexact[Array, "n n"], low: Float[Array, ""]
) -> Float[Array, " n"]:
    """The roots of the eigenvalues, descending, with `low` for those that are less."""
    diagonal, beside = tridiagonal(gram)
    sides = jnp.pad(jnp.abs(beside), 1)
    high = jnp.max(diagonal + sides[1:] + sides[:-1])
    high = jnp.where(high > 0, high, 1)
    info = jnp.finfo(high.dtype)
    squares = jnp.pad((beside / high) ** 2, (1, 0))
    diagonal = diagonal / high
    order = jnp.arange(len(diagonal), dtype=jnp.int32)

    def count_above(x):
        def pivoted(carry, entries):
            pivot, count = carry
            pivot = entries[0] - x - entries[1] / pivot
            pivot = jnp.where(jnp.abs(pivot) < 2 * info.tiny, -2 * info.tiny, pivot)
            return (pivot, count + (pivot > 0).astype(count.dtype)), None

        first = jnp.ones_like(x), jnp.zeros_like(order)
        return lax.scan(pivoted, first, (diagonal, squares))[0][1]

    def halved(_, ends):
        lower, upper = ends
        middle = (lower + upper) / 2
        is_above = count_above(middle) > order
        return jnp.where(is_above, middle, lower), jnp.where(is_above, upper, middle)

    # Above all, and to be left behind by it, is what has no eigenvalue above the bound.
    start = jnp.minimum((low / jnp.sqrt(high)) ** 2, 1)
    ends = jnp.full_like(diagonal, 1) * start, jnp.ones_like(diagonal)
    lower, _ = lax.fori_loop(0, info.nmant + 3, halved, ends)
    return jnp.where(lower > start, jnp.sqrt(lower * high), low)


def _is_connected(gram: Inexact[Array, "n n"]) -> Bool[Array, ""]:
    """Whether the vectors of this Gram matrix are no two sets that are orthogonal, to
    rounding. Zero vectors do not count."""
    eps = float(jnp.finfo(gram.dtype).eps)
    sizes = jnp.sqrt(jnp.maximum(jnp.real(jnp.diagonal(gram)), 0))
    touches = jnp.abs(gram) > 64 * eps * sizes[:, None] * sizes[None]

    def unfinished(carry):
        before, reached = carry
        return jnp.any(before != reached)

    def spread(carry):
        _, reached = carry
        return reached, reached | jnp.any(touches & reached[:, None], axis=0)

    first = jnp.zeros_like(sizes, bool).at[jnp.argmax(sizes)].set(True)
    _, reached = lax.while_loop(unfinished, spread, (jnp.zeros_like(first), first))
    return jnp.all(reached | (sizes == 0))
