r"""Matrix functions by products only: what the polar factor and the cap share.

The products are those of the Newton-Schulz iteration
$X \mapsto X (\alpha I - \beta X^H X)$, whose coefficients follow a lower bound on the
singular values, so that it takes three or four steps near the fixed point and about
twenty from afar.

??? cite

    Functions of Matrices, Higham, SIAM, 2008, chapters 5 and 8. The coefficients are
    scaled as in "A stable scaling of Newton-Schulz for improving the sign function
    computation of a Hermitian matrix", Chen and Chow, preprint ANL/MCS-P5059-0114,
    2014, with a safeguard.
"""

import functools as ft
import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from ._norms import squared_magnitude
from ._platforms import on_cpu
from ._precision import real_dtype
from ._products import Matrices, eye_like, gram_of, matmul


Way: TypeAlias = Literal["factorisation", "products"]
"""How to compute."""


def by_platform(method: Way | None, factorisation: Callable, products: Callable, *args):
    """The result of one of two ways of computing the same."""
    ways = {"factorisation": factorisation, "products": products}
    if method is not None:
        return ways[method](*args)
    return on_cpu(factorisation, products, *args)


def normal_range(matrices: Matrices) -> tuple[Matrices, Float[Array, "blocks 1 1"]]:
    """The matrices and their scales, nearly always 1: powers of two that bring those
    whose products might leave the range to entries of about one."""
    constant = lax.stop_gradient(matrices)
    peak = jnp.max(jnp.abs(constant), axis=(-1, -2), keepdims=True, initial=0)
    far = (peak > 2.0**20) | (peak < 2.0**-20)
    far = far & (peak > 0) & jnp.isfinite(peak)
    # Within what has a normal inverse.
    last = jnp.finfo(peak.dtype).maxexp - 3
    exponent = jnp.clip(jnp.frexp(jnp.where(far, peak, 1))[1], -last, last)
    scale = jnp.ldexp(jnp.ones_like(peak), jnp.where(far, -exponent, 0))
    return matrices * scale.astype(matrices.dtype), scale


def orthogonality_error(gram: Inexact[Array, "blocks n n"]) -> Float[Array, " blocks"]:
    r"""$\max |G - I|$."""
    return jnp.max(jnp.abs(gram - eye_like(gram)), axis=(-1, -2), initial=0)


def if_finite(fn: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """`fn`, but a matrix with NaNs or infinities stays as it is. LAPACK might not
    return from one, or return something finite."""

    def guarded(matrices: Matrices) -> Matrices:
        finite = jnp.all(jnp.isfinite(matrices), axis=(-1, -2), keepdims=True)
        return jnp.where(finite, fn(jnp.where(finite, matrices, 0)), matrices)

    return guarded


# The Newton-Schulz iteration.


def coefficients(low: Array) -> tuple[Array, Array, Array]:
    r"""$\alpha$ and $\beta$ of the odd cubic polynomial that maps $[l, 1]$ into itself
    with the largest lower end, and that end."""
    # A smaller `l` would send 1 to about `l`, and what is at 1 would drown in rounding.
    aim = jnp.maximum(low, 0.1)
    total = 1 + aim + aim * aim
    alpha = 1.5 / jnp.sqrt(total / 3)
    beta = alpha / total
    end = jnp.minimum(alpha * low - beta * low**3, 1)
    # A guess of `low` that was too high ends in the plain iteration.
    return alpha, beta, jnp.where(1 - end < 1e-3, 1, end)


def norm_bound(hermitian: Inexact[Array, "blocks n n"], squarings: int) -> Array:
    """A bound on the spectral norm, kept as `blocks 1 1`: a Schatten norm, or the
    largest sum of a row if that is less."""
    size = jnp.max(jnp.abs(hermitian), axis=(-1, -2), keepdims=True)
    size = jnp.where(size > 0, size, 1)
    power = hermitian / size.astype(hermitian.dtype)
    rows = jnp.max(jnp.sum(jnp.abs(power), axis=-1), axis=-1)[..., None, None]
    for _ in range(squarings):
        power = matmul(power, power)
    squares = jnp.sum(squared_magnitude(power), axis=(-1, -2), keepdims=True)
    return size * jnp.minimum(rows, squares ** (0.5 / 2**squarings))


def combined(alpha: Array, beta: Array, square: Array) -> Array:
    r"""$\alpha I - \beta S$."""
    eye = eye_like(square)
    return alpha.astype(square.dtype) * eye - beta.astype(square.dtype) * square


def iterated(x: Matrices, low: Float[Array, "blocks 1 1"]) -> Matrices:
    """The polar factor of matrices with singular values between about `low` and 1, by
    products only."""
    eps = float(jnp.finfo(x.dtype).eps)
    settled = 4 * eps * math.sqrt(x.shape[-1])

    def unfinished(carry):
        count, _, _, error = carry
        return (count < 100) & jnp.any(error > settled)

    def step(carry):
        count, x, low, _ = carry
        gram = gram_of(x)
        error = orthogonality_error(gram)
        # All that was above `low` is near 1 by now; a direction that is far from it was
        # below. There is no telling how far.
        apart = jnp.sum(squared_magnitude(gram - eye_like(gram)), axis=(-1, -2))
        missed = (low == 1) & (apart[..., None, None] > 0.5)
        low = jnp.where(missed, 0.01, low)
        # The last step is a plain one.
        low = jnp.where(error[..., None, None] > settled, low, 1)
        alpha, beta, low = coefficients(low)
        return count + 1, matmul(x, combined(alpha, beta, gram)), low, error

    error = jnp.full(x.shape[:-2], jnp.inf, low.dtype)
    carry = (jnp.zeros((), jnp.int32), x, low, error)
    return lax.while_loop(unfinished, step, carry)[1]


def polished(x: Matrices) -> Matrices:
    """One plain step, for matrices that are orthogonal but for rounding."""
    half = jnp.asarray(0.5, real_dtype(x.dtype))
    return matmul(x, combined(3 * half, half, gram_of(x)))


# The polar factor.


# Compiled as a whole, for outside of `jit` every loop is compiled anew in every call.
compiled = ft.partial(jax.jit, inline=True)
