r"""Matrices with their singular values capped: $U \Sigma V^H \mapsto U \min(\Sigma, c)
V^H$, by a factorisation or by products, as in `_polar.py`, and its derivatives."""

import functools as ft
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._batching import anywhere
from ._estimators import lanczos
from ._lapack import eigh, thin_svd
from ._linear_map import of_matrix, start_vector
from ._newton_schulz import (
    Way,
    by_platform,
    coefficients,
    combined,
    compiled,
    if_finite,
    norm_bound,
    normal_range,
    polished,
)
from ._norms import squared_magnitude
from ._precision import is_half, widen
from ._products import Matrices, adjoint, as_tall, eye_like, gram_of, matmul
from ._spectral_derivatives import (
    Spectrum,
    divided,
    linearised,
    positive_part,
    root,
    singular_derivative,
)


@ft.partial(compiled, static_argnames="method")
def cap(
    matrices: Matrices, bound: Float[Array, ""], method: Way | None = None
) -> Matrices:
    r"""$U \min(\Sigma, c) V^H$ of matrices $U \Sigma V^H$: the nearest matrices with no
    singular value above the bound $c$. A matrix that has none keeps its bits."""
    wide = widen(matrices)
    if is_half(matrices.dtype):
        # Rounded to nearest, entries change by half of that at most.
        aim = 1 - float(jnp.finfo(matrices.dtype).eps) / 2
    else:
        size = min(matrices.shape[-2:])
        aim = 1 - (16 + math.sqrt(size)) * float(jnp.finfo(wide.dtype).eps)
    capped = if_finite(lambda m: _cap(aim, method, m, bound))
    return as_tall(capped, wide).astype(matrices.dtype)


@ft.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _cap(aim, method, tall, bound):
    scaled, scale = normal_range(tall)
    bounds = bound.astype(scale.dtype) * scale
    squares = jnp.sum(squared_magnitude(scaled), axis=(-1, -2), keepdims=True)
    inside = squares <= bounds**2

    def capped(scaled, bounds):
        eigh = ft.partial(_cap_by_eigh, aim)
        products = ft.partial(_cap_by_products, aim)
        return by_platform(method, eigh, products, scaled, bounds)

    def keep(scaled, bounds):
        return scaled, jnp.zeros_like(bounds, bool)

    outside = anywhere(jnp.any(~inside))
    # Huge ones come down as far as no norm overflows, and the bound stays in range.
    room = 2.0 ** (jnp.finfo(scale.dtype).maxexp * 3 // 4)
    scale = jnp.where(scale < 1, jnp.minimum(scale * room, 1), scale)
    scaled, bounds = tall * scale.astype(tall.dtype), bound.astype(scale.dtype) * scale
    result, moved = lax.cond(outside, capped, keep, scaled, bounds)
    moved = moved & ~inside
    return jnp.where(moved, result / scale.astype(result.dtype), tall)


@_cap.defjvp
def _(aim, method, primals, tangents):
    (tall, bound), (tangent, _) = primals, tangents
    value = _cap(aim, method, tall, bound)
    scaled, scale = normal_range(tall)
    c = (bound.astype(scale.dtype) * scale)[..., 0]
    parts = _cap_parts(lax.stop_gradient(scaled), lax.stop_gradient(c))
    change = linearised(_cap_derivative, _smooth_cap, scaled, c, parts, tangent)
    return value, change


def _cap_parts(tall: Matrices, c: Float[Array, "blocks 1"]) -> tuple[Array, ...]:
    """What the derivative of the cap is made of."""
    u, s, v = _factors_around(tall, c)
    # What is at the bound is inside.
    above = s > c
    i, j = (..., slice(None), None), (..., None, slice(None))
    c = c[..., None]
    low, high = jnp.minimum(s[i], s[j]), jnp.maximum(s[i], s[j])
    one_above = above[i] != above[j]
    both_above = above[i] & above[j]
    gap = jnp.where(one_above, high - low, 1)
    total = jnp.where(above[i] | above[j], low + high, 1)
    plus = jnp.where(one_above, (c - low) / gap, jnp.where(both_above, 0, 1))
    low_value = jnp.minimum(low, c)
    minus = jnp.where(above[i] | above[j], (low_value + c) / total, 1)
    ratio = jnp.where(above, c[..., 0] / jnp.where(above, s, 1), 1)
    inside = ~jnp.any(above, axis=-1)[..., None, None]
    return inside, u, v, plus, minus, ratio


def _cap_derivative(inside: Array, *parts_and_tangent: Array) -> Matrices:
    change = singular_derivative(*parts_and_tangent)
    return jnp.where(inside, parts_and_tangent[-1], change)


def _smooth_cap(tall: Matrices, c: Float[Array, "blocks 1"]) -> Matrices:
    r"""With $A = W / c$, it is $W (I + (A^H A - I)_+)^{-1/2}$."""
    gram = gram_of(tall / c[..., None].astype(tall.dtype))
    eye = eye_like(gram)
    stretch = root(eye + positive_part(gram - eye, 1.0))
    return divided(tall, stretch, Spectrum.of(stretch))


def _right_factors(tall):
    """The right singular vectors, their images, and the norms of these: the singular
    values, which are more exact than the roots of the eigenvalues."""
    _, v = eigh(gram_of(tall))
    # What LAPACK leaves of their inner products would be multiplied with all else.
    v = polished(v)
    images = matmul(tall, v)
    return v, images, jnp.sqrt(jnp.sum(squared_magnitude(images), axis=-2))


def _factors_around(tall, c):
    """The thin singular value decomposition, as `u`, `s` and `v`, exact for values of
    about `c` too, where others are far above it."""
    v, images, s = _right_factors(tall)
    far_above = _FAR * c

    def as_found(tall, v, images, s):
        del tall
        return _units(images, s), s, v

    def in_two(tall, *_):
        # The rounding of what is far above would drown all else: it is taken off, put
        # back at a lower value, and all is decomposed again.
        u, s, vh = thin_svd(tall)
        top, far = jnp.maximum(s[..., :1], far_above), s > far_above
        u = jnp.where(far[..., None, :], u, 0)
        v = jnp.where(far[..., None, :], adjoint(vh), 0)
        for _ in range(2):
            tall = tall - matmul(u, matmul(adjoint(u), tall))
            tall = tall - matmul(matmul(tall, v), adjoint(v))
        lower = (far_above * (1 + s / top))[..., None, :].astype(u.dtype)
        v, images, s = _right_factors(tall + matmul(u * lower, adjoint(v)))
        is_lower = s > far_above * (1 + far_above / (2 * top))
        actual = jnp.where(is_lower, top * (s / far_above - 1), s)
        return _units(images, s), actual, v

    is_far = jnp.max(s, axis=-1, keepdims=True) > far_above
    return lax.cond(anywhere(jnp.any(is_far)), in_two, as_found, tall, v, images, s)


_FAR = 8
"""How many times the bound what is above it may be before its rounding matters."""


def _units(images, s):
    """The left singular vectors; zero where a singular value is."""
    nonzero = s > 32 * jnp.finfo(s.dtype).eps * jnp.max(s, axis=-1, keepdims=True)
    size = jnp.where(nonzero, s, 1)[..., None, :].astype(images.dtype)
    return jnp.where(nonzero[..., None, :], images / size, 0)


def _cap_by_eigh(aim, tall, bounds):
    def unfinished(carry):
        return jnp.any(carry[1] > bounds)

    def step(carry):
        before, _, moved = carry
        x, scale = normal_range(before)
        v, images, s = _right_factors(x)
        s = s[..., None, :]
        top = jnp.max(s, axis=-1, keepdims=True)
        bound = bounds * scale
        # What is far above the bound would leave its rounding behind: it comes down in
        # stages. The last one makes the matrix anew or, if there is little to take away
        # from it, takes that away. NaNs end it.
        last, near = ~(top > 4.2 * bound), ~(top > 2 * bound)
        stage = jnp.where(last, bound, jnp.maximum(1.25 * bound, top / 16))
        any_above = jnp.any(s > stage, axis=-1, keepdims=True)
        # What is just below the bound might be lifted over it by rounding, and LAPACK's
        # is relative to the square of the largest.
        slack = 3 * jnp.finfo(s.dtype).eps * jnp.where(near, 0, top / bound) ** 2
        goal = jnp.where(last, (aim - slack) * stage, stage)
        factor = jnp.minimum(goal / jnp.where(s > 0, s, goal), 1)
        weights = (factor - near.astype(factor.dtype)).astype(x.dtype)
        result = matmul(images * weights, adjoint(v))
        result = jnp.where(near, x + result, result)
        result = jnp.where(any_above, result / scale.astype(x.dtype), before)
        return result, jnp.where(last, bounds, jnp.inf), moved | any_above

    carry = (tall, jnp.full_like(bounds, jnp.inf), jnp.zeros_like(bounds, bool))
    x, _, moved = lax.while_loop(unfinished, step, carry)
    return x, moved


def _cap_by_products(aim, tall, bounds):
    estimate = jax.vmap(lambda a: lanczos(of_matrix(a), start_vector(a)).value)
    moved = (estimate(tall) > bounds[..., 0, 0])[..., None, None]
    scaled, scale = normal_range(tall)
    high = jnp.sqrt(norm_bound(gram_of(scaled), 2)) / scale

    def unfinished(carry):
        return jnp.any(carry[1] > bounds)

    def step(carry):
        x, high = carry
        stage = jnp.maximum(bounds, high / 4)
        target = jnp.where(stage > bounds, stage, aim * bounds)
        result = jnp.where(high > bounds, _capped_once(x, target, high / target), x)
        return result, stage

    carry = (tall, jnp.where(moved, high, 0))
    return lax.while_loop(unfinished, step, carry)[0], moved


def _capped_once(x: Matrices, c: Array, ratio: Array) -> Matrices:
    r"""The cap of matrices of norm at most `ratio * c`, by products only: with
    $H = A^H A / c^2$, it is $A \max(H, I)^{-1/2}$, where
    $2 \max(H, I) = H + I + |H - I|$."""
    gram = gram_of(x / c.astype(x.dtype))
    size = jnp.maximum(ratio * ratio, 2) - 1
    shifted = gram - eye_like(gram)
    tiny = 4 * jnp.finfo(c.dtype).eps
    sign, _ = _settle(
        lambda sign, _, alpha, beta: (
            matmul(sign, combined(alpha, beta, matmul(sign, sign))),
            sign,
        ),
        shifted / size.astype(x.dtype),
        shifted,
        jnp.full_like(size, tiny),
    )
    magnitude = matmul(shifted, sign)
    larger = (gram + eye_like(gram) + (magnitude + adjoint(magnitude)) / 2) / 2

    def both_roots(y, z, alpha, beta):
        factor = combined(alpha, beta, matmul(z, y))
        return matmul(y, factor), matmul(factor, z)

    ratio = jnp.sqrt(size + 1)
    _, inverse_root = _settle(
        both_roots, larger / (size + 1).astype(x.dtype), eye_like(gram), 1 / ratio
    )
    return matmul(x, inverse_root / ratio.astype(x.dtype))


def _settle(update: Callable, first: Array, second: Array, low: Array):
    """Newton-Schulz steps on a pair of matrices until all above `low` has settled."""
    # Errors of 1e-3 go to 1.5e-6, 3e-12 and 2e-23 in plain steps.
    plain = 2 if jnp.finfo(low.dtype).bits <= 32 else 3

    def unfinished(carry):
        return carry[0] < plain

    def step(carry):
        extra, first, second, low = carry
        extra = jnp.where(jnp.all(low == 1), extra + 1, extra)
        alpha, beta, low = coefficients(low)
        return extra, *update(first, second, alpha, beta), low

    carry = (jnp.zeros((), jnp.int32), first, second, low)
    return lax.while_loop(unfinished, step, carry)[1:3]
