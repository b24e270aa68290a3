r"""The nearest matrices of a structure, and their derivatives.

Means with a mirror image are linear. The two other maps decompose,
$W = V \Lambda V^H$ or $W = U \Sigma V^H$: some of the values are kept and the others
dropped. Each matrix is decomposed at a size of about one; a derivative needs only the
ratios of its values.
"""

import functools as ft
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact

from ._lapack import eigh, eigvalsh, thin_svd
from ._norms import squared_magnitude
from ._precision import is_half, margin, tolerance, widen
from ._products import Matrices, adjoint, matmul
from ._spectral_derivatives import (
    hermitian,
    known,
    linearised,
    positive_part,
    singular_derivative,
    top_projector,
)


def minus_adjoint(matrices: Matrices) -> Matrices:
    return -adjoint(matrices)


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def mean_with(mirror: Callable[[Array], Array], matrices: Matrices) -> Matrices:
    """The mean of a matrix and its mirror image; where both are equal, to the bit."""
    wide = widen(matrices)
    # Halved first, so that no sum overflows; XLA would halve the sum.
    halves = lax.optimization_barrier((wide * 0.5, mirror(wide) * 0.5))
    mean = (halves[0] + halves[1]).astype(matrices.dtype)
    return jnp.where(matrices == mirror(matrices), matrices, mean)


@mean_with.defjvp
def _(mirror, primals, tangents):
    wide = widen(tangents[0])
    mean = (wide + mirror(wide)) / 2
    return mean_with(mirror, *primals), mean.astype(tangents[0].dtype)


class _Scaled(NamedTuple):
    """Matrices that can be decomposed: in at least single precision, finite, and with
    entries of at most about one."""

    matrices: Matrices
    scale: Float[Array, "blocks 1 1"]
    """What they were divided by: a power of two, so that no bit is lost."""
    finite: Bool[Array, "blocks 1 1"]
    """Where this is false, a matrix had NaNs or infinities, and now is zero."""

    def undo(self, matrices: Matrices) -> Matrices:
        return matrices * self.scale.astype(matrices.dtype)


def _scaled(matrices: Matrices) -> _Scaled:
    axes = (-2, -1)
    finite = jnp.all(jnp.isfinite(matrices), axis=axes, keepdims=True)
    wide = jnp.where(finite, widen(matrices), 0)
    info = jnp.finfo(wide.dtype)
    # The powers of two whose inverses are normal numbers too.
    peak = jnp.max(jnp.abs(lax.stop_gradient(wide)), axis=axes, keepdims=True)
    peak = jnp.where(peak > 0, peak, 1)
    peak = jnp.clip(peak, float(info.tiny), float(2.0 ** (info.maxexp - 2)))
    scale = lax.reduce_precision(peak, exponent_bits=info.nexp, mantissa_bits=0)
    return _Scaled(wide * (1 / scale).astype(wide.dtype), scale, finite)


@jax.custom_jvp
def nearest_semidefinite(matrices: Matrices) -> Matrices:
    return _semidefinite(matrices)[0]


@nearest_semidefinite.defjvp
def _(primals, tangents):
    r"""With $\Lambda_\pm$ the magnitudes of the eigenvalues that are kept and of those
    that are dropped, and $A = V^H \mathrm{sym}(H) V$,

    $$\mathrm{D}F[H] = \mathrm{sym}(H) - V (\Delta \circ A) V^H, \quad \Delta_{ij}
    = \frac{\lambda_{-i} + \lambda_{-j}}
    {\lambda_{+i} + \lambda_{-i} + \lambda_{+j} + \lambda_{-j}}.$$
    """
    (matrices,), (tangent,) = primals, tangents
    value, values, vectors = _semidefinite(lax.stop_gradient(matrices))
    kept = _is_kept(values)
    dropped = _pair_sums(jnp.where(kept, 0, -values))
    total = _pair_sums(jnp.where(kept, jnp.maximum(values, 0), -values))
    share = jnp.where(total > 0, dropped / jnp.where(total > 0, total, 1), 0)
    at, sym = hermitian(widen(matrices)), hermitian(widen(tangent))
    fast, smooth = _semidefinite_derivative, _smooth_semidefinite
    change = linearised(fast, smooth, at, (), (share, vectors), sym)
    value = known(nearest_semidefinite, value, matrices)
    return value, change.astype(tangent.dtype)


def _semidefinite_derivative(share: Array, vectors: Array, sym: Matrices) -> Matrices:
    inner = matmul(matmul(adjoint(vectors), sym), vectors)
    inner = share.astype(inner.dtype) * inner
    return sym - matmul(matmul(vectors, inner), adjoint(vectors))


def _smooth_semidefinite(sym: Matrices, _: tuple[()]) -> Matrices:
    scaled = _scaled(sym)
    return scaled.undo(scaled.matrices + positive_part(-scaled.matrices))


def _semidefinite(matrices: Matrices) -> tuple[Matrices, Array, Array]:
    """The nearest positive semidefinite matrices, and the eigenvalues, ascending, and
    eigenvectors of the symmetric parts, scaled."""
    scaled = _scaled(matrices)
    sym = hermitian(scaled.matrices)
    values, vectors = eigh(sym)
    symmetric = jnp.all(matrices == adjoint(matrices), axis=(-2, -1))
    fits = symmetric & jnp.all(_is_kept(values), axis=-1)
    # As a Gram matrix it has no negative eigenvalue but for the rounding of its own
    # entries, however inexact the eigenvectors are.
    roots = jnp.sqrt(jnp.maximum(values, 0))
    factor = vectors * roots[..., None, :].astype(vectors.dtype)
    point = matmul(factor, adjoint(factor))
    point = (point + adjoint(point)) / 2
    moved = _lifted(scaled, point, matrices.dtype)
    unchanged = fits[..., None, None] | ~scaled.finite
    return jnp.where(unchanged, matrices, moved), values, vectors


def _is_kept(values: Float[Array, "blocks n"]) -> Bool[Array, "blocks n"]:
    """Whether eigenvalues are, to rounding, not negative."""
    top = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    return values >= -margin(values.dtype) * top


def _lifted(scaled: _Scaled, point: Matrices, dtype: jnp.dtype) -> Matrices:
    """A semidefinite matrix in `dtype`, with its diagonal raised by what rounding may
    have taken from its eigenvalues."""
    norm = jnp.sqrt(jnp.sum(squared_magnitude(point), axis=(-2, -1), keepdims=True))
    lift = float(jnp.finfo(norm.dtype).eps) * norm
    rounded = scaled.undo(point).astype(dtype)
    if is_half(dtype):
        # Here rounding takes more, and less by far than could be said in advance.
        point = rounded.astype(point.dtype) / scaled.scale
        finite = jnp.where(jnp.isfinite(point), point, 0)
        lowest = eigvalsh(finite)[..., :1, None]
        lift = jnp.maximum(margin(dtype) * norm - lowest, 0)
    raised = scaled.undo(point + lift.astype(point.dtype))
    eye = jnp.eye(point.shape[-1], dtype=bool)[None]
    return jnp.where(eye, _rounded_up(raised, dtype), rounded)


def _rounded_up(x: Inexact[Array, "*shape"], dtype: jnp.dtype) -> Array:
    """`x`, if it is not negative, in `dtype` and not less."""
    nearest = x.astype(dtype)
    if x.dtype == dtype:
        return nearest
    bits = lax.bitcast_convert_type(nearest, jnp.uint16)
    too_small = nearest.astype(x.dtype) < x
    return lax.bitcast_convert_type(bits + too_small.astype(jnp.uint16), dtype)


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def nearest_of_rank(rank: int, tall: Matrices) -> Matrices:
    return _of_rank(rank, tall)[0]


@nearest_of_rank.defjvp
def _(rank, primals, tangents):
    (tall,), (tangent,) = primals, tangents
    value, u, s, v = _of_rank(rank, lax.stop_gradient(tall))
    kept = jnp.arange(s.shape[-1]) < rank
    kept = jnp.broadcast_to(kept, s.shape)
    top = s[..., :1]
    # What is dropped from a matrix in the set is rounding.
    s = jnp.where(~kept & (s <= tolerance(tangent.dtype) * top), 0, s)
    share = jnp.where(kept, s, 0)
    total = _pair_sums(s)
    either = kept[..., :, None] | kept[..., None, :]
    minus = _pair_sums(share) / jnp.where(total > 0, total, 1)
    minus = jnp.where(total > 0, minus, either.astype(s.dtype))
    # Of one that is kept and one that is dropped. Where they are equal the map jumps.
    mixed = kept[..., :, None] != kept[..., None, :]
    gap = jnp.abs(s[..., :, None] - s[..., None, :])
    wide_enough = mixed & (gap > tolerance(s.dtype) * top[..., None])
    plus = jnp.where(
        wide_enough, _pair_sums(share) / jnp.where(wide_enough, gap, 1), minus
    )
    parts = (u, v, plus, minus, kept.astype(s.dtype))
    at, smooth = widen(tall), ft.partial(_smooth_of_rank, rank)
    change = linearised(singular_derivative, smooth, at, (), parts, widen(tangent))
    value = known(ft.partial(nearest_of_rank, rank), value, tall)
    return value, change.astype(tangent.dtype)


def _smooth_of_rank(rank: int, tall: Matrices, _: tuple[()]) -> Matrices:
    scaled = _scaled(tall)
    gram = matmul(adjoint(scaled.matrices), scaled.matrices)
    return scaled.undo(matmul(scaled.matrices, top_projector(rank, gram)))


def _of_rank(rank: int, tall: Matrices) -> tuple[Matrices, Array, Array, Array]:
    """The nearest matrices of a rank below that of others of their shape, and the thin
    singular value decomposition of the given ones, scaled."""
    scaled = _scaled(tall)
    u, s, vh = thin_svd(scaled.matrices)
    fits = s[..., rank] <= tolerance(tall.dtype) * s[..., 0]
    left = u[..., :rank] * s[..., None, :rank].astype(u.dtype)
    moved = scaled.undo(matmul(left, vh[..., :rank, :])).astype(tall.dtype)
    unchanged = fits[..., None, None] | ~scaled.finite
    return jnp.where(unchanged, tall, moved), u, s, adjoint(vh)


def _pair_sums(x: Float[Array, "blocks n"]) -> Float[Array, "blocks n n"]:
    """The sums of any two entries."""
    return x[..., :, None] + x[..., None, :]
