r"""The polar factor of a matrix, and what it shares with the cap of `_cap.py`.

Both are functions of the singular values that leave the singular vectors alone, and
both are computed in one of two ways: by a factorisation, which is faster on CPUs, or by
matrix products only, which is faster on accelerators. All functions take stacks of
matrices, of any shape: wide ones are transposed first.

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

from ._factors import (
    Spectrum,
    divided,
    hermitian,
    lyapunov,
)
from ._norms import anywhere, real_dtype, squared_magnitude, widen
from ._singular import adjoint, fixed_vector, matmul


Way: TypeAlias = Literal["factorisation", "products"]
"""How to compute."""

Matrices: TypeAlias = Inexact[Array, "blocks m n"]


def by_platform(method: Way | None, factorisation: Callable, products: Callable, *args):
    """The result of one of two ways of computing the same."""
    ways = {"factorisation": factorisation, "products": products}
    if method is not None:
        return ways[method](*args)
    return lax.platform_dependent(*args, cpu=factorisation, default=products)


def as_tall(fn: Callable[..., Array], *matrices: Matrices) -> Matrices:
    """`fn` of matrices that have at least as many rows as columns."""
    rows, columns = matrices[0].shape[-2:]
    if rows < columns:
        return adjoint(fn(*map(adjoint, matrices)))
    return fn(*matrices)


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


def gram_of(tall: Matrices) -> Inexact[Array, "blocks n n"]:
    """$A^H A$."""
    return matmul(adjoint(tall), tall)


def orthogonality_error(gram: Inexact[Array, "blocks n n"]) -> Float[Array, " blocks"]:
    r"""$\max |G - I|$."""
    return jnp.max(jnp.abs(gram - eye_like(gram)), axis=(-1, -2), initial=0)


def eye_like(square: Inexact[Array, "*batch n n"]) -> Inexact[Array, "*batch n n"]:
    eye = jnp.eye(square.shape[-1], dtype=square.dtype)
    return jnp.broadcast_to(eye, square.shape)


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


@ft.partial(compiled, static_argnames=("tol", "method"))
def polar(matrices: Matrices, tol: float, method: Way | None = None) -> Matrices:
    r"""$U V^H$ of matrices $U \Sigma V^H$: the nearest matrices with orthonormal
    columns or, if they are wide, rows. Where a singular value is zero, some orthonormal
    direction is chosen. A matrix whose `orthogonality_error` is at most `tol` keeps its
    bits.

    It has derivatives of all orders; a direction of no length, relatively, has none.
    """
    nearest = if_finite(ft.partial(_polar, tol, method))
    return as_tall(nearest, widen(matrices)).astype(matrices.dtype)


@ft.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _polar(tol, method, tall):
    scaled, scale = normal_range(tall)
    none = (jnp.full(scale.shape, jnp.inf, scale.dtype),) * 2
    # Most matrices are far from orthogonal, and one vector is enough to see that.
    looked_at = anywhere(jnp.any(_moved(scaled) < 0.5))
    spread, error = lax.cond(looked_at, _distances, lambda _: none, scaled)
    # All squares of singular values are then within `spread` of 1.
    near = spread < 0.5

    def from_near(scaled, spread):
        low = jnp.sqrt((1 - spread) / (1 + spread))
        return iterated(scaled / jnp.sqrt(1 + spread).astype(scaled.dtype), low)

    def from_afar(scaled, spread):
        del spread
        return by_platform(method, _polar_by_svd, _polar_by_products, scaled)

    far = anywhere(jnp.any(~near))
    result = lax.cond(far, from_afar, from_near, scaled, spread)
    return jnp.where((error <= tol) & (scale == 1), tall, result)


def _moved(tall: Matrices) -> Float[Array, " blocks"]:
    """How far $A^H A$ moves some unit vector."""
    vector = fixed_vector(tall.shape[-1], tall.dtype)
    image = matmul(adjoint(tall), matmul(tall, vector)[..., None])[..., 0]
    return jnp.sqrt(jnp.sum(squared_magnitude(image - vector[None]), axis=-1))


def _distances(tall: Matrices) -> tuple[Array, Array]:
    """A bound on the spectral norm of $A^H A - I$, and its largest entry."""
    gram = gram_of(tall)
    spread = norm_bound(gram - eye_like(gram), 1)
    return spread, orthogonality_error(gram)[..., None, None]


@_polar.defjvp
def _(tol, method, primals, tangents):
    r"""With $S = Q^H W$, and $Y$ the solution of $S Y + Y S = Q^H H - H^H Q$,

    $$\mathrm{D}F[H] = Q Y + (I - Q Q^H) H S^{-1}.$$
    """
    (tall,), (tangent,) = primals, tangents
    q = _polar(tol, method, tall)
    scaled, scale = normal_range(tall)
    tangent = tangent * scale.astype(tangent.dtype)
    stretch = hermitian(matmul(adjoint(q), scaled))
    spectrum = Spectrum.of(stretch)
    inner = matmul(adjoint(q), tangent)
    change = matmul(q, lyapunov(stretch, inner - adjoint(inner), spectrum))
    # A square Q has no space to leave.
    if tall.shape[-2] > tall.shape[-1]:
        beyond = tangent - matmul(q, inner)
        change = change + divided(beyond, stretch, spectrum)
    return q, change


def _polar_by_svd(tall):
    u, _, vh = jnp.linalg.svd(tall, full_matrices=False)
    return polished(matmul(u, vh))


def _polar_by_products(tall):
    eps = float(jnp.finfo(tall.dtype).eps)
    high = jnp.sqrt(norm_bound(gram_of(tall), 2) * (1 + 64 * eps))
    x = tall / jnp.where(high > 0, high, 1).astype(tall.dtype)
    # Where there is no direction, this is one: it is no larger than the rounding of
    # the matrix itself, and between any two null spaces it has full rank.
    rows, columns = tall.shape[-2:]
    seed = fixed_vector(rows * columns, tall.dtype).reshape(1, rows, columns)
    seed = seed * (eps * math.sqrt(columns) / 2)
    return iterated(x + seed, jnp.full_like(high, eps))
