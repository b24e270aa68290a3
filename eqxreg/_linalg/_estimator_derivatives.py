r"""The derivatives of a largest singular value and of the vectors that attain it.

With $A v = \sigma u$, it is $\mathrm{d}\sigma = \mathrm{Re}\, u^H\, \mathrm{d}A\, v$.
Derivatives of that need those of $u$ and $v$, which are the solution of a linear
system, found by products. Nothing of it is computed unless it is asked for.
"""

import functools as ft
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact

from ._estimators import lanczos
from ._linear_map import LinearIn, LinearMap, Top, fixed_vector, unit


def attained(
    linear: LinearIn, weight: Inexact[Array, "..."], top: Top
) -> Float[Array, ""]:
    """`top.value`, an estimate of the norm of `linear(weight)`, with the derivatives of
    the largest singular value in the weight."""
    return _attained(linear, weight, lax.stop_gradient(top))


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attained(linear, weight, top):
    return top.value


@_attained.defjvp
def _(linear, primals, tangents):
    (weight, top), (tangent, _) = primals, tangents
    left, right = moving(linear, weight, top)
    change = jnp.sum(jnp.real(jnp.conj(left) * linear(tangent).forward(right)))
    return _attained(linear, weight, top), change


def moving(
    linear: LinearIn, weight: Inexact[Array, "..."], top: Top
) -> tuple[Inexact[Array, " m"], Inexact[Array, " n"]]:
    r"""`top.left` and `top.right`, with their derivatives in the weight. With $q$ for
    both, one above the other, $J$ for the map with its adjoint, which swaps them, and
    $H$ for the change of $J$, what is orthogonal to $q$ of

    $$(\sigma - J)\, \mathrm{d}q = (H - \mathrm{d}\sigma)\, q.$$

    If $\sigma$ is not simple, the vectors have no derivative, and count as constants.
    In first derivatives of a norm nothing of this is computed."""
    return _moving(linear, weight, lax.stop_gradient(top))


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _moving(linear, weight, top):
    return top.left, top.right


@_moving.defjvp
def _(linear, primals, tangents):
    (weight, top), (tangent, _) = primals, tangents
    constant = linear(lax.stop_gradient(weight))
    # Vectors that were good enough for a norm need not be for their own derivatives.
    eps = float(jnp.finfo(top.value.dtype).eps)
    fine = lanczos(constant, top.right, tol=8 * eps, cycles=32)
    value = _attained(linear, weight, fine)
    pair = _moving(linear, weight, fine)
    here, along = linear(weight), linear(tangent)
    swapped = lambda of, x: (of.forward(x[1]), of.adjoint(x[0]))
    forces = swapped(along, pair)
    slope = jnp.sum(jnp.real(jnp.conj(pair[0]) * forces[0])).astype(pair[0].dtype)

    def system(x: tuple[Array, Array]) -> tuple[Array, Array]:
        share = _inner(pair, x) / 2
        size = value.astype(share.dtype)
        added = lambda x, q, image: size * (x + share * q) - image
        return jax.tree.map(added, x, pair, swapped(here, x))

    solve = ft.partial(_conjugate_gradients, floor=fine.value * 100 * eps)
    is_simple = _is_simple(constant, fine)
    force = lambda h, q: jnp.where(is_simple, h - slope * q, 0)
    force = jax.tree.map(force, forces, pair)
    change = lax.custom_linear_solve(system, force, solve, solve)
    return _moving(linear, weight, top), change


def _is_simple(linear: LinearMap, top: Top) -> Bool[Array, ""]:
    """Whether no other singular value is as large, to rounding."""
    eps = float(jnp.finfo(top.value.dtype).eps)
    left_out = lambda x: x - _inner(top.right, x) * top.right
    others = LinearMap(
        lambda x: linear.forward(left_out(x)), lambda y: left_out(linear.adjoint(y))
    )
    start = left_out(fixed_vector(top.right.size, top.right.dtype))
    second = lanczos(others, unit(start)[0], tol=8 * eps).value
    return top.value - second > 100 * eps * top.value


def _inner(x: Any, y: Any) -> Inexact[Array, ""]:
    products = jax.tree.map(lambda a, b: jnp.sum(jnp.conj(a) * b), x, y)
    return jax.tree.reduce(operator.add, products)


def _conjugate_gradients(
    system: Callable[[Any], Any], known: Any, *, floor: Float[Array, ""]
) -> Any:
    """The solution of a positive semidefinite system, but for directions in which it is
    not above `floor`."""
    size = lambda x: jnp.real(_inner(x, x))
    plus = lambda x, factor, y: jax.tree.map(
        lambda a, b: a + factor.astype(a.dtype) * b, x, y
    )
    total = sum(leaf.size for leaf in jax.tree.leaves(known))
    eps = float(jnp.finfo(floor.dtype).eps)

    def unfinished(carry):
        count, _, left_over, _, is_regular = carry
        large = size(left_over) > (4 * eps) ** 2 * size(known)
        return (count < min(4 * total, 2000)) & large & is_regular

    def step(carry):
        count, x, left_over, direction, _ = carry
        image = system(direction)
        stretch = jnp.real(_inner(direction, image))
        is_regular = stretch > floor * size(direction)
        rate = jnp.where(
            is_regular, size(left_over) / jnp.where(is_regular, stretch, 1), 0
        )
        x, new = plus(x, rate, direction), plus(left_over, -rate, image)
        ratio = size(new) / size(left_over)
        return count + 1, x, new, plus(new, ratio, direction), is_regular

    zero = jax.tree.map(jnp.zeros_like, known)
    carry = (jnp.zeros((), jnp.int32), zero, known, known, jnp.asarray(True))
    return lax.while_loop(unfinished, step, carry)[1]
