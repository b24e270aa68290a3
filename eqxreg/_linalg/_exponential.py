"""The exponential of matrices."""

import functools as ft
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Inexact

from ._batching import anywhere
from ._lapack import over
from ._precision import real_dtype
from ._products import eye_like, matmul


# The largest sum of magnitudes in a column for which Padé approximations of these
# degrees are exact to rounding: Higham, The Scaling and Squaring Method for the Matrix
# Exponential Revisited, 2005, tables 2.3 and 3.1.
_PADE_DEGREE = {jnp.dtype("float32"): 7, jnp.dtype("float64"): 13}
_PADE_REACH = 3.9

# After a few halvings, squaring leaves no more than one polish repairs.
_FEW_HALVINGS, _MOST_HALVINGS = 5, 18


def exponential(
    square: Inexact[Array, "*batch n n"],
) -> tuple[Inexact[Array, "*batch n n"], Bool[Array, ""]]:
    """By scaling and squaring. Also whether any matrix was halved many times."""
    norms = jnp.max(jnp.sum(jnp.abs(lax.stop_gradient(square)), axis=-2), axis=-1)
    halvings = jnp.ceil(jnp.log2(norms / _PADE_REACH))[..., None, None]
    halvings = jnp.clip(halvings, 0, _MOST_HALVINGS).astype(jnp.int32)
    scale = jnp.ldexp(jnp.ones(halvings.shape, norms.dtype), -halvings)
    # NaN for what is out of reach even so.
    scaled = square * scale.astype(square.dtype)
    power = _near_zero(scaled)

    def step(power, i):
        more = i < halvings
        squared = lambda power: jnp.where(more, matmul(power, power), power)
        again = anywhere(jnp.any(more))
        return lax.cond(again, squared, lambda power: power, power), None

    for i in range(_FEW_HALVINGS):
        power, _ = step(power, i)

    # What all the steps that do nothing would keep for the backward pass is a lot.
    @jax.checkpoint
    def rest(power):
        steps = jnp.arange(_FEW_HALVINGS, _MOST_HALVINGS, dtype=jnp.int32)
        return lax.scan(jax.checkpoint(step), power, steps)[0]

    far = anywhere(jnp.any(halvings > _FEW_HALVINGS))
    return lax.cond(far, rest, lambda power: power, power), far


def _near_zero(square: Array) -> Array:
    r"""The exponential of matrices within the reach: Padé's $(q - p)^{-1} (q + p)$,
    with the odd terms in $p$ and the even ones in $q$."""
    degree = _PADE_DEGREE[real_dtype(square.dtype)]
    terms = [_pade_term(degree, k) for k in range(degree + 1)]
    eye = eye_like(square)
    second = matmul(square, square)
    fourth = matmul(second, second)
    sixth = matmul(second, fourth)
    powers = eye, second, fourth, sixth

    def sums(terms: list[float]) -> Array:
        result = _weighted(terms, powers)
        # The others are multiples of the last power.
        more = terms[len(powers) :]
        return result + matmul(sixth, _weighted(more, powers[1:])) if more else result

    odd, even = matmul(square, sums(terms[1::2])), sums(terms[::2])
    # All of these are functions of one matrix, and commute.
    return over(even + odd, even - odd)


def _weighted(factors: Sequence[float], arrays: Sequence[Array]) -> Array:
    return ft.reduce(operator.add, map(operator.mul, factors, arrays))


def _pade_term(degree: int, k: int) -> float:
    ways = math.perm(degree, k) / math.perm(2 * degree, k)
    return ways / math.factorial(k)
