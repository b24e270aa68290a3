r"""Weights at another norm: $w \mapsto w\, t / \lVert w \rVert$, with one derivative.

A *plan* says, from the norms of a weight's slices, which slices are to have which norm
$t$. What the norm maps differ in is their plan; value and derivative are here. With
$v = t \hat w$ for the result and $\hat w = w / \lVert w \rVert$,

$$\mathrm{d}v = \frac{t}{\lVert w \rVert}
\left(\mathrm{d}w - \hat w \langle \hat w, \mathrm{d}w \rangle\right)
+ \hat w\, \mathrm{d}t,$$

which is one multiple of $\mathrm{d}w$ and one of $v$ for each slice: two passes over
memory, forward and backward alike. And $v$, unlike $w$, has a size that is in range.
"""

import functools as ft
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact

from .._linalg import (
    is_half,
    margin,
    narrow,
    on_tpu,
    scaled_norm,
    tolerance,
    widen,
)


class Norms(NamedTuple):
    """The norms of a weight's slices: `norm / scale`, which need not be representable.
    Compare them by the methods."""

    norm: Float[Array, "..."]
    scale: Float[Array, "..."]

    def above(self, bound: Array) -> Bool[Array, "..."]:
        return self.norm > bound * self.scale

    def below(self, bound: Array) -> Bool[Array, "..."]:
        return self.norm < bound * self.scale

    @property
    def nonzero(self) -> Bool[Array, "..."]:
        return self.norm > 0


class Plan(NamedTuple):
    """What is to become of each slice."""

    target: Float[Array, "..."]
    """The norm to have."""
    moves: Bool[Array, "..."]
    """Whether the slice changes; else it keeps its bits."""
    bends: Bool[Array, "..."]
    """Whether its derivative is that of the formula; else it is the identity."""


def norms_of(weight: Inexact[Array, "..."], axes: tuple[int, ...]) -> Norms:
    """The norms of the slices of `weight` over `axes`."""
    return Norms(*scaled_norm(weight, axes))


# A plan is called as `plan(norms, dtype, *bounds)`, with the dtype of the weight.


def at_most(norms: Norms, dtype, high: Array) -> Plan:
    """Slices that are longer than `high` go just below it."""
    above = norms.above(high)
    return Plan(high * (1 - margin(dtype)), above, above)


@ft.cache
def towards(rate: float) -> Callable[..., Plan]:
    """`between`, `rate` of the way. It is one object for each rate, for what is
    compiled is kept by plan."""
    return ft.partial(between, rate=rate)


def between(norms: Norms, dtype, low: Array, high: Array, *, rate: float) -> Plan:
    """Slices that are out of range go `rate` of the way into it. A zero slice has no
    direction, and stays."""
    above = norms.above(high)
    # If the bounds are closer to each other than rounding is fine, then what was just
    # moved must still count as being between them.
    below = norms.below(jnp.minimum(low, high * (1 - tolerance(dtype))))
    # Over `low` by what rounding can take away, but not above `high`.
    up = tolerance(dtype) if is_half(dtype) else margin(dtype)
    raised = jnp.minimum(low * (1 + up), high * (1 - margin(dtype)))
    target = jnp.where(above, high * (1 - margin(dtype)), raised)
    if rate < 1:
        target = rate * target + (1 - rate) * (norms.norm / norms.scale)
    moves = (above | below) & norms.nonzero
    return Plan(target, moves, moves)


def exactly(norms: Norms, dtype, norm: Array) -> Plan:
    """All slices that are not at `norm` already go there. On the sphere too, only the
    tangential part of a derivative counts."""
    off = norms.above(norm) | norms.below(norm * (1 - tolerance(dtype)))
    target = norm * (1 - margin(dtype))
    return Plan(target, off & norms.nonzero, norms.nonzero)


# Compiled as a whole, so that layers of one shape are traced once.


@ft.partial(jax.jit, static_argnums=(0, 1), inline=True)
def rescale(
    plan: Callable[..., Plan],
    axes: tuple[int, ...],
    weight: Inexact[Array, "*shape"],
    *bounds: Array,
) -> Inexact[Array, "*shape"]:
    """`weight` with its slices over `axes` at the norms of `plan`."""
    return _rescale(plan, axes, weight, *bounds)


@ft.partial(jax.jit, static_argnums=(0, 1), inline=True)
def factors(
    plan: Callable[..., Plan],
    axes: tuple[int, ...],
    weight: Inexact[Array, "..."],
    *bounds: Array,
) -> Float[Array, "..."]:
    """What `rescale` multiplies the slices of `weight` by."""
    return _factors(plan, axes, weight, *bounds)


@ft.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _rescale(plan, axes, weight, *bounds):
    norms = norms_of(weight, axes)
    made = plan(norms, weight.dtype, *bounds)
    moved = narrow(_at(norms, made.target, weight), weight.dtype)
    return jnp.where(made.moves, moved, weight)


@_rescale.defjvp
def _(plan, axes, primals, tangents):
    (weight, *_), (tangent, *_) = primals, tangents
    made = _Made.of(plan, axes, *primals)
    value = jnp.where(made.plan.moves, narrow(made.moved, weight.dtype), weight)
    dtype, tangent = made.result.dtype, widen(tangent)
    along = _along(plan, axes, made, primals, tangents)
    across = jnp.where(made.plan.bends, made.slope, 1)
    change = across.astype(dtype) * tangent + along.astype(dtype) * made.result
    return value, _written(change.astype(weight.dtype), axes)


@ft.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _factors(plan, axes, weight, *bounds):
    return _Made.of(plan, axes, weight, *bounds).factors


@_factors.defjvp
def _(plan, axes, primals, tangents):
    made = _Made.of(plan, axes, *primals)
    # Where the result changes by a multiple of itself, so does the factor.
    return made.factors, made.factors * _along(plan, axes, made, primals, tangents)


class _Made(NamedTuple):
    """What a plan makes of a weight."""

    norms: Norms
    plan: Plan
    moved: Inexact[Array, "..."]
    """All slices at the norms of the plan, before rounding."""
    result: Inexact[Array, "..."]
    """The slices that move there, and the others as they are."""

    @classmethod
    def of(cls, plan, axes, weight, *bounds) -> "_Made":
        norms = norms_of(weight, axes)
        made = plan(norms, weight.dtype, *bounds)
        moved = _at(norms, made.target, weight)
        return cls(norms, made, moved, jnp.where(made.moves, moved, widen(weight)))

    @property
    def slope(self) -> Float[Array, "..."]:
        norm = jnp.where(self.norms.nonzero, self.norms.norm, 1)
        return self.plan.target * self.norms.scale / norm

    @property
    def factors(self) -> Float[Array, "..."]:
        return jnp.where(self.plan.moves, self.slope, 1)


def _along(plan, axes, made: _Made, primals, tangents) -> Float[Array, "..."]:
    """The multiple of the result that its derivative has in it."""
    (weight, *bounds), (tangent, *bound_tangents) = primals, tangents
    norms = made.norms
    # Masks are kept to the norms: one over the weight would be one over the gradient in
    # the transpose, written to memory.
    size = jnp.where(made.plan.moves, made.plan.target, norms.norm / norms.scale)
    # A target is zero only where a relative bound is.
    size = jnp.where(size > 0, size, 1)
    inner = jnp.real(jnp.conj(made.result) * widen(tangent))
    norm_tangent = jnp.sum(inner, axis=axes, keepdims=True) / size

    def target(norm, *bounds):
        again = plan(Norms(norm, norms.scale), weight.dtype, *bounds)
        return jnp.broadcast_to(again.target, norm.shape)

    target_tangent = jax.jvp(
        target,
        (norms.norm, *bounds),
        (norm_tangent * norms.scale, *bound_tangents),
    )[1]
    change = (target_tangent - made.slope * norm_tangent) / size
    return jnp.where(made.plan.bends, change, 0)


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def with_gain(
    axes: tuple[int, ...],
    weight: Inexact[Array, "*shape"],
    gain: Inexact[Array, "..."],
) -> Inexact[Array, "*shape"]:
    r"""$w \mapsto g\, w / \lVert w \rVert$ for the slices of `weight` over `axes`, with
    a gain for each. A gain that is the norm changes no bit. A zero slice has no
    direction: it stays zero, and its derivative is the identity."""
    norms = norms_of(weight, axes)
    target = jnp.where(norms.nonzero, gain.astype(norms.norm.dtype), 0)
    return _at(norms, target, weight).astype(weight.dtype)


@with_gain.defjvp
def _(axes, primals, tangents):
    (weight, gain), (tangent, gain_tangent) = primals, tangents
    norms, tangent = norms_of(weight, axes), widen(tangent)
    across = _gain_slope(norms, gain)
    along = _gain_along(axes, norms, weight, gain, tangent, gain_tangent)
    dtype = tangent.dtype
    change = across.astype(dtype) * tangent + along.astype(dtype) * widen(weight)
    change = _written(change.astype(weight.dtype), axes)
    return with_gain(axes, weight, gain), change


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def gain_factors(
    axes: tuple[int, ...],
    weight: Inexact[Array, "..."],
    gain: Inexact[Array, "..."],
) -> Float[Array, "..."]:
    """What `with_gain` multiplies the slices of `weight` by."""
    return _gain_slope(norms_of(weight, axes), gain)


@gain_factors.defjvp
def _(axes, primals, tangents):
    (weight, gain), (tangent, gain_tangent) = primals, tangents
    norms = norms_of(weight, axes)
    along = _gain_along(axes, norms, weight, gain, widen(tangent), gain_tangent)
    return _gain_slope(norms, gain), along


def _gain_slope(norms: Norms, gain: Array) -> Array:
    norm = jnp.where(norms.nonzero, norms.norm, 1)
    slope = gain.astype(norm.dtype) / norm * norms.scale
    return jnp.where(norms.nonzero, slope, 1)


def _gain_along(
    axes: tuple[int, ...],
    norms: Norms,
    weight: Array,
    gain: Array,
    tangent: Array,
    gain_tangent: Array,
) -> Array:
    """The derivative of the slope."""
    # In the order in which nothing is out of range that has no reason to be: the result
    # has a size that is in range, the weight need not have.
    slope, inverse = _gain_slope(norms, gain), _gain_slope(norms, jnp.ones_like(gain))
    result = widen(weight) * slope.astype(tangent.dtype)
    inner = jnp.sum(jnp.real(jnp.conj(result) * tangent), axis=axes, keepdims=True)
    change = (gain_tangent.astype(slope.dtype) - inner * inverse) * inverse
    return jnp.where(norms.nonzero, change, 0)


def _at(norms: Norms, target: Array, weight: Array) -> Array:
    """The slices at norm `target`, before rounding; a zero slice stays zero."""
    wide = widen(weight)
    factor = target / jnp.where(norms.nonzero, norms.norm, 1)
    # In this order of the products nothing overflows that has no reason to.
    return wide * norms.scale.astype(wide.dtype) * factor.astype(wide.dtype)


@ft.partial(jax.jit, static_argnums=1, inline=True)
def _written(gradient: Array, axes: tuple[int, ...]) -> Array:
    """A tangent, whose cotangent is in memory before anything is made of it. If sums
    over its rows were fused with what makes it, it would be transposed on TPUs, and the
    weight too."""
    if len(axes) == gradient.ndim:
        return gradient
    return on_tpu(lax.optimization_barrier, lambda x: x, gradient)
