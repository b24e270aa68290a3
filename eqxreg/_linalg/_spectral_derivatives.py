r"""Derivatives, of every order, of maps that act on singular values or eigenvalues.

The first derivative of such a map is a closed form of a decomposition, with factors
that are finite where values meet or vanish: `singular_derivative`. The decomposition
itself has no derivative there, so nothing is differentiated through it. Instead, a map
has a second, *smooth* form, of products, inverses and solutions of Lyapunov equations,
all of which have derivatives of all orders. `linearised` is a first derivative that is
computed in closed form, and differentiated as that of the smooth form.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from ._lapack import eigh
from ._products import adjoint, matmul


def singular_derivative(
    u: Inexact[Array, "*batch m n"],
    v: Inexact[Array, "*batch n n"],
    plus: Float[Array, "*batch n n"],
    minus: Float[Array, "*batch n n"],
    ratio: Float[Array, "*batch n"],
    tangent: Inexact[Array, "*batch m n"],
) -> Inexact[Array, "*batch m n"]:
    r"""The derivative of $F(W) = U f(\Sigma) V^H$ at a tall $W = U \Sigma V^H$, in the
    direction $H$: with $A = U^H H V$,

    $$\mathrm{D}F[H] = U \left(\Gamma^+ \circ \mathrm{sym} A
    + \Gamma^- \circ \mathrm{skew} A\right) V^H
    + (H V - U A)\, \mathrm{diag}(\rho)\, V^H,$$

    $$\Gamma^+_{ij} = \frac{f(\sigma_i) - f(\sigma_j)}{\sigma_i - \sigma_j}, \quad
    \Gamma^-_{ij} = \frac{f(\sigma_i) + f(\sigma_j)}{\sigma_i + \sigma_j}, \quad
    \rho_i = \frac{f(\sigma_i)}{\sigma_i},$$

    where $\mathrm{sym} A = (A + A^H)/2$ and $\mathrm{skew} A = (A - A^H)/2$. It is
    linear in $H$ and, as all factors are symmetric, its own adjoint. The derivative
    for a wide matrix is that for its adjoint.

    **Arguments:**

    - `u`, `v`: the thin singular value decomposition $W = U \Sigma V^H$, with $V$
        itself, not its adjoint. What matters of $\Sigma$ is in the factors.
    - `plus`, `minus`: the symmetric matrices $\Gamma^+$ and $\Gamma^-$.
    - `ratio`: the vector $\rho$.
    - `tangent`: the direction $H$.

    **Returns:**

    $\mathrm{D}F[H]$, of the shape of `tangent`.
    """
    dtype = tangent.dtype
    image = matmul(tangent, v)
    inner = matmul(adjoint(u), image)
    sym = (inner + adjoint(inner)) / 2
    skew = (inner - adjoint(inner)) / 2
    within = plus.astype(dtype) * sym + minus.astype(dtype) * skew
    # What leaves the column space of U. A square U has none to leave.
    beyond = (image - matmul(u, inner)) * ratio[..., None, :].astype(dtype)
    return matmul(matmul(u, within) + beyond, adjoint(v))


def linearised(
    fast: Callable[..., Array],
    smooth: Callable[[Array, Any], Array],
    at: Inexact[Array, "*shape"],
    others: Any,
    parts: Any,
    tangent: Inexact[Array, "*shape"],
) -> Inexact[Array, "*shape"]:
    r"""`fast(*parts, tangent)`, the derivative of `smooth(at, others)` in its first
    argument, which itself differentiates as such.

    A rule for derivatives alone would not be enough. Where the derivative is
    transposed, for a gradient, JAX takes such a rule to be needed no more, and the
    gradient would be differentiated through `fast`. What it always keeps is a linear
    system: of $D$ with $D^H = D$, for $D b$,

    $$\begin{pmatrix} 0 & I \\ I & -D \end{pmatrix} \begin{pmatrix} x \\ y \end{pmatrix}
    = \begin{pmatrix} b \\ 0 \end{pmatrix}, \quad x = D b, \quad y = b.$$

    **Arguments:**

    - `fast`, `smooth`: functions that can be hashed and close over no arrays. `fast` is
        linear in its last argument, and its own adjoint.
    - `at`, `others`: what to differentiate at. `others` are constant.
    - `parts`: arrays, a tuple, taken to be constant: of their change `smooth` knows.
    - `tangent`: the direction.
    """
    others, parts = lax.stop_gradient((others, parts))

    # Pairs are one array, for JAX transposes a system as a whole or not at all.
    def system(unknown: Array) -> Array:
        first, second = unknown
        change = _derivative(fast, smooth, at, others, parts, _joined(second, at))
        return jnp.stack([second, first - _split(change)])

    def solved(_, pair: Array) -> Array:
        first, second = pair
        return jnp.stack([second + _split(fast(*parts, _joined(first, at))), first])

    along = _split(tangent)
    pair = jnp.stack([along, jnp.zeros_like(along)])
    solution = lax.custom_linear_solve(system, pair, solved, symmetric=True)
    return _joined(solution[0], at)


# JAX transposes without conjugating, so that what is symmetric is the map of real and
# imaginary parts.


def _split(x: Inexact[Array, "*shape"]) -> Float[Array, "..."]:
    return jnp.stack([lax.real(x), lax.imag(x)]) if jnp.iscomplexobj(x) else x


def _joined(parts: Float[Array, "..."], like: Inexact[Array, "*shape"]) -> Array:
    return lax.complex(*parts) if jnp.iscomplexobj(like) else parts


@ft.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _derivative(fast, smooth, at, others, parts, tangent):
    return fast(*parts, tangent)


@_derivative.defjvp
def _(fast, smooth, primals, tangents):
    (at, others, parts, tangent), (at_dot, *_, tangent_dot) = primals, tangents

    def derivative(at):
        return jax.jvp(lambda x: smooth(x, others), (at,), (tangent,))[1]

    _, bend = jax.jvp(derivative, (at,), (at_dot,))
    return fast(*parts, tangent), bend + fast(*parts, tangent_dot)


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def known(fn: Callable[..., Array], value: Array, *args: Array) -> Array:
    """`value`, which is known to be `fn(*args)`, and differentiates as that. In first
    derivatives, `fn` is not called."""
    return value


@known.defjvp
def _(fn, primals, tangents):
    (value, *args), (_, *changes) = primals, tangents
    _, change = jax.jvp(fn, tuple(args), tuple(changes))
    return known(fn, value, *args), change


class Spectrum(NamedTuple):
    """The eigenvalues, none of which is negative, and eigenvectors of a Hermitian
    matrix. They are constants."""

    values: Float[Array, "*batch n"]
    vectors: Inexact[Array, "*batch n n"]
    floor: Float[Array, "*batch 1"]
    """An eigenvalue that is not above this is rounding."""

    @classmethod
    def of(cls, square: Inexact[Array, "*batch n n"], unit: float = 0.0) -> "Spectrum":
        """That of a positive semidefinite matrix, or of the magnitude of one that is
        Hermitian and a difference of matrices of a norm of `unit`, if it is one."""
        square = lax.stop_gradient(square)
        values, vectors = eigh(square)
        values = jnp.abs(values)
        size = jnp.max(values, axis=-1, keepdims=True, initial=unit)
        return cls(values, vectors, _rounding_of(size))


def _rounding_of(size: Float[Array, "*batch 1"]) -> Float[Array, "*batch 1"]:
    return 32 * float(jnp.finfo(size.dtype).eps) * size


def lyapunov(
    square: Inexact[Array, "*batch n n"],
    right: Inexact[Array, "*batch n n"],
    spectrum: Spectrum,
) -> Inexact[Array, "*batch n n"]:
    """The solution of $S X + X S = R$ for a positive semidefinite $S$, whose spectrum
    is known. What belongs to two vanishing eigenvalues of $S$ is left out."""
    total = spectrum.values[..., :, None] + spectrum.values[..., None, :]
    factors = inverse(total, 2 * spectrum.floor[..., None])

    def solved(vectors: Array, right: Array) -> Array:
        inner = matmul(matmul(adjoint(vectors), right), vectors)
        inner = factors.astype(inner.dtype) * inner
        return matmul(matmul(vectors, inner), adjoint(vectors))

    vectors = spectrum.vectors
    return lax.custom_linear_solve(
        lambda x: matmul(square, x) + matmul(x, square),
        right,
        lambda _, b: solved(vectors, b),
        lambda _, b: solved(jnp.conj(vectors), b),
    )


def divided(
    above: Inexact[Array, "*batch m n"],
    below: Inexact[Array, "*batch n n"],
    spectrum: Spectrum,
) -> Inexact[Array, "*batch m n"]:
    """The solution of $X S = A$ for a positive semidefinite $S$, whose spectrum is
    known. What belongs to a vanishing eigenvalue is left out."""
    factors = inverse(spectrum.values, spectrum.floor)
    vectors = spectrum.vectors
    pseudo = matmul(
        vectors * factors[..., None, :].astype(vectors.dtype), adjoint(vectors)
    )
    return lax.custom_linear_solve(
        lambda x: matmul(x, below),
        above,
        lambda _, b: matmul(b, pseudo),
        lambda _, b: matmul(b, jnp.swapaxes(pseudo, -1, -2)),
    )


def inverse(x: Array, floor: Array) -> Array:
    """`1 / x`, and zero where `x` is not above `floor`."""
    above = x > floor
    return jnp.where(above, 1 / jnp.where(above, x, 1), 0)


def hermitian(square: Inexact[Array, "*batch n n"]) -> Inexact[Array, "*batch n n"]:
    """The Hermitian part."""
    return (square + adjoint(square)) / 2


# Smooth forms of what is done to the eigenvalues of a Hermitian matrix.


@ft.partial(jax.custom_jvp, nondiff_argnums=(1,))
def positive_part(square: Inexact[Array, "*batch n n"], unit: float = 0.0) -> Array:
    r"""$X_+ = V \max(\Lambda, 0) V^H$, with $\mathrm{D}X_+[H]$ the solution of
    $|X| Y + Y |X| = X_+ H + H X_+$. `unit` is as in `Spectrum.of`."""
    values, vectors = eigh(square)
    kept = jnp.maximum(values, 0)[..., None, :].astype(vectors.dtype)
    return matmul(vectors * kept, adjoint(vectors))


@positive_part.defjvp
def _(unit, primals, tangents):
    (square,), (tangent,) = primals, tangents
    positive = positive_part(square, unit)
    spectrum = Spectrum.of(square, unit)
    right = matmul(positive, tangent) + matmul(tangent, positive)
    return positive, lyapunov(2 * positive - square, right, spectrum)


@jax.custom_jvp
def root(square: Inexact[Array, "*batch n n"]) -> Array:
    r"""$R = X^{1/2}$ of a positive definite matrix, with $\mathrm{D}R[H]$ the solution
    of $R Y + Y R = H$."""
    values, vectors, _ = Spectrum.of(square)
    return matmul(
        vectors * jnp.sqrt(values)[..., None, :].astype(vectors.dtype), adjoint(vectors)
    )


@root.defjvp
def _(primals, tangents):
    (square,), (tangent,) = primals, tangents
    result = root(square)
    values, vectors, floor = Spectrum.of(square)
    spectrum = Spectrum(jnp.sqrt(values), vectors, jnp.sqrt(floor))
    return result, lyapunov(result, tangent, spectrum)


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def top_projector(rank: int, square: Inexact[Array, "*batch n n"]) -> Array:
    r"""The orthogonal projector onto the `rank` largest eigenvalues. With $N = 2 P - I$
    and $\theta$ between these eigenvalues and the others, $\mathrm{D}P[H]$ is half the
    solution of $|X - \theta| Y + Y |X - \theta| = H - N H N$."""
    _, vectors = eigh(square)
    kept = vectors[..., :, -rank:]
    return matmul(kept, adjoint(kept))


@top_projector.defjvp
def _(rank, primals, tangents):
    (square,), (tangent,) = primals, tangents
    projector = top_projector(rank, square)
    values, vectors = eigh(square)
    between = (values[..., -rank] + values[..., -rank - 1])[..., None] / 2
    eye = jnp.broadcast_to(jnp.eye(square.shape[-1], dtype=square.dtype), square.shape)
    sign = 2 * projector - eye
    shifted = square - between[..., None].astype(square.dtype) * eye
    right = tangent - matmul(matmul(sign, tangent), sign)
    floor = _rounding_of(jnp.max(jnp.abs(values), axis=-1, keepdims=True))
    spectrum = Spectrum(jnp.abs(values - between), vectors, floor)
    change = lyapunov(hermitian(matmul(sign, shifted)), right, spectrum)
    return projector, change / 2
