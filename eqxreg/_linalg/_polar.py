"""The polar factor of a matrix, and its derivatives.

It is a function of the singular values that leaves the singular vectors alone, computed
in one of two ways: by a factorisation, which is faster on CPUs, or by the products of
`_newton_schulz.py`, which are faster on accelerators.
"""

import functools as ft
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._batching import anywhere
from ._lapack import thin_svd
from ._linear_map import fixed_vector
from ._newton_schulz import (
    Way,
    by_platform,
    compiled,
    if_finite,
    iterated,
    norm_bound,
    normal_range,
    orthogonality_error,
    polished,
)
from ._norms import squared_magnitude
from ._precision import widen
from ._products import Matrices, adjoint, as_tall, eye_like, gram_of, matmul
from ._spectral_derivatives import Spectrum, divided, hermitian, lyapunov


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
    u, _, vh = thin_svd(tall)
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
