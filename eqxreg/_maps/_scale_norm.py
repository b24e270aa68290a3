r"""Weights scaled so that a norm that is a largest singular value is as planned.

A plan of `_rescale.py` says what the norm is to be, as it does for the norm maps; what
differs is the norm and its derivative. A `Measure` says what norm it is and how it is
found: of a matrix or of any linear map that the weight makes; anew, from a vector that
was good a moment ago, or from one that may have been.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact

from .._linalg import (
    LinearIn,
    LinearMap,
    Top,
    attained,
    fixed_vector,
    gram,
    lanczos,
    moving,
    narrow,
    of_matrix,
    power_iteration,
    settled,
    svd,
    unit,
    widen,
)
from ._matrix import over_blocks
from ._rescale import Norms, Plan


Estimator = Literal["lanczos", "gram", "svd"]
"""How the largest singular value is found."""


class Measure(NamedTuple):
    """A norm of a weight, as the norm of a linear map that the weight makes."""

    linear: LinearIn
    """The map, which depends on the weight linearly."""
    top: Callable[[Array, Array], Top]
    """Its largest singular value, from a weight, which may be in half precision, and a
    vector to start from."""


class Target(NamedTuple):
    """What norm a weight is to have."""

    plan: Callable[..., Plan]
    bound: Float[Array, ""]


def scale_norm(
    target: Target,
    measure: Measure,
    weight: Inexact[Array, "*shape"],
    start: Inexact[Array, " n"],
) -> tuple[Inexact[Array, "*shape"], Inexact[Array, " n"]]:
    """A weight, scaled so that its norm is as planned, and a vector to start from next
    time."""
    factor, following = norm_factor(target, measure, weight, start)
    wide = widen(weight)
    return narrow(wide * factor.astype(wide.dtype), weight.dtype), following


def norm_factor(
    target: Target,
    measure: Measure,
    weight: Inexact[Array, "..."],
    start: Inexact[Array, " n"],
) -> tuple[Float[Array, ""], Inexact[Array, " n"]]:
    r"""What `scale_norm` multiplies a weight by, and a vector to start from next time.
    With $f = t / \sigma$ and $\mathrm{d}\sigma = \mathrm{Re}\, u^H A_{\mathrm{d}w} v$,
    the derivative is

    $$-\frac{f}{\sigma}\, \mathrm{Re}\, u^H A_{\mathrm{d}w} v.$$
    """
    return _norm_factor(target.plan, measure, weight, start, target.bound)


@ft.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _norm_factor(plan, measure, weight, start, bound):
    made, top = _planned(plan, measure, weight, start, bound)
    return jnp.where(made.moves, _factor(made, top), 1), next_start(top, start)


@_norm_factor.defjvp
def _(plan, measure, primals, tangents):
    (weight, start, bound), (tangent, *_) = primals, tangents
    made, top = _planned(plan, measure, lax.stop_gradient(weight), start, bound)
    value = attained(measure.linear, widen(weight), top)
    top = Top(value, *moving(measure.linear, widen(weight), top))
    factor = jnp.where(made.moves, _factor(made, top), 1)
    along = _along(measure, top, widen(tangent)) / jnp.where(value > 0, value, 1)
    following = next_start(top, start)
    tangents = -jnp.where(made.bends, along, 0) * factor, jnp.zeros_like(following)
    return (factor, following), tangents


def _planned(plan, measure, weight, start, bound):
    top = measure.top(weight, start)
    # What overflowed, or is not a number, is too long.
    top = top._replace(value=jnp.where(jnp.isnan(top.value), jnp.inf, top.value))
    norms = Norms(top.value, jnp.ones_like(top.value))
    return plan(norms, weight.dtype, bound), top


def _factor(made: Plan, top: Top) -> Array:
    factor = made.target / jnp.where(top.value > 0, top.value, 1)
    # A weight is not to vanish because a factor does.
    return jnp.where(factor < jnp.finfo(factor.dtype).tiny, jnp.nan, factor)


def next_start(top: Top, start: Array) -> Array:
    """The vector found, unless the weight is zero or not finite, and has none."""
    return lax.stop_gradient(jnp.where(_is_positive(top.value), top.right, start))


def _is_positive(value: Array) -> Bool[Array, ""]:
    return (value > 0) & jnp.isfinite(value)


def _along(measure: Measure, top: Top, tangent: Array) -> Float[Array, ""]:
    _, left, right = top
    if measure.linear is of_matrix:
        # One pass over the tangent; in the transpose an outer product, which is never
        # written to memory by itself.
        outer = jnp.conj(left)[:, None] * right[None, :]
        return jnp.sum(jnp.real(outer * tangent))
    image = measure.linear(tangent).forward(right)
    return jnp.sum(jnp.real(jnp.conj(left) * image))


# Estimates of the norm of a matrix, from a weight and a vector to start from.


def _lanczos(linear: LinearIn, weight: Array, start: Array) -> Top:
    return from_start(linear(widen(weight)), start)


def from_start(linear: LinearMap, start: Inexact[Array, " n"], **options: Any) -> Top:
    """Lanczos on the side with fewer dimensions, which it exhausts sooner."""
    image = linear.forward(start)
    if image.size < start.size:
        direction, size = unit(image)
        other = fixed_vector(image.size, image.dtype)
        image = jnp.where(_is_positive(size), direction, other)
        return lanczos(linear.flipped, image, **options).flipped
    return lanczos(linear, start, **options)


def _power(steps: int, linear: LinearIn, weight: Array, start: Array) -> Top:
    # A matrix in half precision is read as it is.
    weight = weight if linear is of_matrix else widen(weight)
    return power_iteration(linear(weight), start, steps)


def _settled(linear: LinearIn, weight: Array, start: Array) -> Top:
    # A baked layer is to agree with the wrapper, whose program rounds in other places,
    # by far better than to the error of the search.
    return settled(linear(widen(weight)), start, tol=1e-4)


ESTIMATORS: dict[str, Measure] = {
    "lanczos": Measure(of_matrix, ft.partial(_lanczos, of_matrix)),
    "gram": Measure(of_matrix, lambda weight, _: gram(widen(weight))),
    "svd": Measure(of_matrix, lambda weight, _: svd(widen(weight))),
}


def cold(linear: LinearIn) -> Measure:
    """The norm of a linear map, from any start."""
    return ESTIMATORS["lanczos"] if linear is of_matrix else _by(_lanczos, linear)


def warm(steps: int, linear: LinearIn = of_matrix) -> Measure:
    """By steps of power iteration, from what the last ones found."""
    return _warm(steps) if linear is of_matrix else _by(_power, linear, steps)


def sure(linear: LinearIn = of_matrix) -> Measure:
    """From a vector that may have been good once: to 1e-3, whatever it is."""
    return _SURE if linear is of_matrix else _by(_settled, linear)


def _by(top: Callable, linear: LinearIn, *args: int) -> Measure:
    return Measure(linear, ft.partial(top, *args, linear))


# One object for each, for what is compiled is kept by measure.
_SURE = _by(_settled, of_matrix)


@ft.cache
def _warm(steps: int) -> Measure:
    return _by(_power, of_matrix, steps)


# Compiled as a whole, for outside of `jit` every loop is compiled anew in every call.


@ft.partial(jax.jit, static_argnums=(0, 1), inline=True)
def scaled_blocks(measure, plan, bound, matrices, starts):
    scale = ft.partial(scale_norm, Target(plan, bound), measure)
    return over_blocks(scale, matrices, starts)


@ft.partial(jax.jit, static_argnums=(0, 1), inline=True)
def block_factors(measure, plan, bound, matrices, starts):
    factor = ft.partial(norm_factor, Target(plan, bound), measure)
    return over_blocks(factor, matrices, starts)


@ft.partial(jax.jit, static_argnums=0, inline=True)
def block_values(measure, matrices, starts):
    def value(matrix, start):
        top = measure.top(lax.stop_gradient(matrix), start)
        return attained(of_matrix, matrix, top)

    return over_blocks(value, matrices, starts)


@ft.partial(jax.jit, inline=True)
def settled_blocks(bound, matrices, starts):
    """The largest singular values, where they are not well below a bound."""
    top = lambda matrix, start: settled(of_matrix(matrix), start, enough=bound)
    return over_blocks(top, matrices, starts)
