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
from jaxtyping import Array, Bool, Float, Inexact

from .._norms import is_half, margin, narrow, scaled_norm, tolerance, widen


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
    return Norms(*scaled_norm(widen(weight), axes))


# A plan is called as `plan(norms, dtype, *bounds)`, with the dtype of the weight.


def at_most(norms: Norms, dtype, high: Array) -> Plan:
    """Slices that are longer than `high` go just below it."""
    above = norms.above(high)
    return Plan(high * (1 - margin(dtype)), above, above)


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


@ft.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def rescale(
    plan: Callable[..., Plan],
    axes: tuple[int, ...],
    weight: Inexact[Array, "*shape"],
    *bounds: Array,
) -> Inexact[Array, "*shape"]:
    """`weight` with its slices over `axes` at the norms of `plan`."""
    norms = norms_of(weight, axes)
    made = plan(norms, weight.dtype, *bounds)
    moved = narrow(_at(norms, made.target, weight), weight.dtype)
    return jnp.where(made.moves, moved, weight)


@rescale.defjvp
def _(plan, axes, primals, tangents):
    (weight, *bounds), (tangent, *bound_tangents) = primals, tangents
    norms = norms_of(weight, axes)
    made = plan(norms, weight.dtype, *bounds)
    moved = _at(norms, made.target, weight)
    value = jnp.where(made.moves, narrow(moved, weight.dtype), weight)

    # The result before rounding, and its norm. Masks are kept to the norms: one over
    # the weight would be one over the gradient in the transpose, written to memory.
    wide, tangent = jnp.where(made.moves, moved, widen(weight)), widen(tangent)
    size = jnp.where(made.moves, made.target, norms.norm / norms.scale)
    # A target is zero only where a relative bound is.
    size = jnp.where(size > 0, size, 1)
    inner = jnp.real(jnp.conj(wide) * tangent)
    norm_tangent = jnp.sum(inner, axis=axes, keepdims=True) / size

    def target(norm, *bounds):
        made = plan(Norms(norm, norms.scale), weight.dtype, *bounds)
        return jnp.broadcast_to(made.target, norm.shape)

    target_tangent = jax.jvp(
        target,
        (norms.norm, *bounds),
        (norm_tangent * norms.scale, *bound_tangents),
    )[1]
    slope = made.target * norms.scale / jnp.where(norms.nonzero, norms.norm, 1)
    along = jnp.where(made.bends, (target_tangent - slope * norm_tangent) / size, 0)
    across = jnp.where(made.bends, slope, 1)
    dtype = wide.dtype
    change = across.astype(dtype) * tangent + along.astype(dtype) * wide
    return value, change.astype(weight.dtype)


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
    norms = norms_of(weight, axes)
    (norm, scale), wide = norms, widen(weight)
    gain, gain_tangent = gain.astype(norm.dtype), gain_tangent.astype(norm.dtype)
    value = with_gain(axes, weight, gain)

    # As above, masks and scales are kept to the norms.
    tangent, norm = widen(tangent), jnp.where(norms.nonzero, norm, 1)
    inner = jnp.sum(jnp.real(jnp.conj(wide) * tangent), axis=axes, keepdims=True)
    norm_tangent = inner * scale / norm * scale
    along = (gain_tangent - gain * norm_tangent / norm) / norm * scale
    across = jnp.where(norms.nonzero, gain / norm * scale, 1)
    along = jnp.where(norms.nonzero, along, 0)
    change = across.astype(wide.dtype) * tangent + along.astype(wide.dtype) * wide
    return value, change.astype(weight.dtype)


def _at(norms: Norms, target: Array, weight: Array) -> Array:
    """The slices at norm `target`, before rounding; a zero slice stays zero."""
    wide = widen(weight)
    factor = target / jnp.where(norms.nonzero, norms.norm, 1)
    # In this order of the products nothing overflows that has no reason to.
    return wide * norms.scale.astype(wide.dtype) * factor.astype(wide.dtype)
