r"""The largest singular value of a linear map, and what attains it.

Each estimator takes the map as a pair of functions, so that a matrix, a convolution and
a sharded weight are served by the same code:

- `power_step`: two products from a good start, as training has it; from below.
- `lanczos`: from any start, a few dozen products; from below, to about 1e-6 as a rule
  and to 1e-4 where many singular values crowd at the top.
- `settled`, in `_certified.py`: from a vector that may have been good once; to 1e-3,
  the cheaper the better the vector.
- `gram`: matrix products, for matrices only; from above, so that it certifies.
- `svd`: for matrices only; the reference.

All of them give $u$ and $v$ with $A v = \sigma u$, and hence one derivative,
$\mathrm{d}\sigma = \mathrm{Re}\, u^H\, \mathrm{d}A\, v$, of which
`_estimator_derivatives.py` makes all. Where several singular values are the largest, it
is the derivative along one of their directions.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact, Int

from ._lapack import thin_svd
from ._linear_map import LinearMap, Top, empty_top, fixed_vector, unit
from ._norms import squared_magnitude
from ._precision import real_dtype
from ._products import adjoint, matmul


def power_step(linear: LinearMap, right: Inexact[Array, " n"]) -> Top:
    """One step of power iteration, from a unit vector. The value is read off the second
    product, which is as good as half a step more."""
    left, _ = unit(linear.forward(right))
    right, value = unit(linear.adjoint(left))
    return Top(value, left, right)


def power_iteration(linear: LinearMap, start: Inexact[Array, " n"], steps: int) -> Top:
    """Steps of power iteration, from a unit vector that was good a moment ago."""
    top = power_step(linear, start)
    for _ in range(steps - 1):
        top = power_step(linear, top.right)
    return top


def search(linear: LinearMap, right: Inexact[Array, " n"]) -> Inexact[Array, " n"]:
    """A vector that is stretched most, for power iteration to go on from. It looks
    further than around `right`, which may have been overtaken unseen: in floating
    point, a direction that power iteration has long shrunk is gone."""
    if right.size == 0:
        return right
    start = unit(right + fixed_vector(right.size, right.dtype) / 2)[0]
    return _krylov(linear, start, min(8, right.size))


def lanczos(
    linear: LinearMap,
    start: Inexact[Array, " n"],
    *,
    steps: int = 24,
    tol: float = 1e-3,
    cycles: int = 8,
) -> Top:
    r"""Golub-Kahan-Lanczos bidiagonalisation with full reorthogonalisation, restarted
    with the vector it has found until that is a singular vector to within `tol`.

    **Arguments:**

    - `linear`: the map. Flip it if its domain is larger than its range.
    - `start`: a unit vector of its domain.
    - `steps`: the dimension of the Krylov space. It need not be more than that of
        `start`.
    - `tol`: the residual $\lVert A^H u - \sigma v \rVert / \sigma$ to stop at. The
        error of $\sigma$ is of the order of its square.
    - `cycles`: the largest number of spaces to build.

    **Returns:**

    An estimate that is not above the truth, but for rounding.

    ??? cite

        [Calculating the Singular Values and Pseudo-Inverse of a
        Matrix](https://doi.org/10.1137/0702016), Golub and Kahan, 1965. [Low-Rank
        Matrix Approximation Using the Lanczos Bidiagonalization
        Process](https://doi.org/10.1137/S1064827597327309), Simon and Zha, 2000.
    """
    image = jax.eval_shape(linear.forward, start)
    if start.size == 0 or image.size == 0:
        return empty_top(image.size, start.size, start.dtype)
    steps = min(steps, start.size)
    info = jnp.finfo(start.dtype)
    far = 2.0 ** (info.maxexp // 2)

    def cycle(carry):
        count, scale, top, _ = carry
        near = linear.scaled(scale)
        right = _krylov(near, top.right, steps)
        left, value = unit(near.forward(right))
        image = near.adjoint(left)
        residual = unit(image - value.astype(image.dtype) * right)[1]
        right, value = unit(image)
        # What overflows, or is lost below the normal numbers, is looked at again from
        # nearer or further. The weight itself is not touched.
        huge, tiny = ~jnp.isfinite(value), value < float(info.tiny) / float(info.eps)
        again = (scale == 1) & (huge | tiny)
        scale = jnp.where(again, jnp.where(huge, 1 / far, far), scale)
        top = Top(value, left, jnp.where(again, start, right))
        return count + 1, scale, top, jnp.where(again, jnp.inf, residual)

    def unfinished(carry):
        count, _, top, residual = carry
        unsettled = (residual > tol * top.value) | jnp.isposinf(residual)
        return (count == 0) | ((count < cycles) & unsettled)

    left = jnp.zeros_like(image)
    zero = jnp.zeros((), real_dtype(start.dtype))
    carry = (jnp.zeros((), jnp.int32), zero + 1, Top(zero, left, start), zero)
    _, scale, top, _ = lax.while_loop(unfinished, cycle, carry)
    return top._replace(value=top.value / scale)


def _krylov(
    linear: LinearMap, start: Inexact[Array, " n"], steps: int
) -> Inexact[Array, " n"]:
    """The unit vector of the Krylov space of `start` that is stretched most."""

    def extend(j, carry):
        basis, images, v = carry
        basis, image, v, _, _ = extended(linear, basis, j, v)
        return basis, images.at[j].set(image), v

    image = jax.eval_shape(linear.forward, start)
    basis = jnp.zeros((steps, *start.shape), start.dtype)
    images = jnp.zeros((steps, *image.shape), image.dtype)
    basis, images, _ = lax.fori_loop(0, steps, extend, (basis, images, start))
    images = images / _size_or_one(images)
    weights = top_eigenvector(matmul(jnp.conj(images), images.T))
    return unit(matmul(weights, basis))[0]


class Extended(NamedTuple):
    """A Krylov space with one more vector $v$ in it."""

    basis: Inexact[Array, "k n"]
    """Orthonormal vectors. Rows not yet filled are zero."""
    image: Inexact[Array, " m"]
    """$A v$."""
    following: Inexact[Array, " n"]
    """The unit vector that comes next; zero if the space is exhausted."""
    length: Float[Array, ""]
    r"""$\lVert A v \rVert$."""
    new: Float[Array, ""]
    r"""The norm of the part of $A^H A v / \lVert A v \rVert$ outside of the space."""


def extended(
    linear: LinearMap,
    basis: Inexact[Array, "k n"],
    j: Int[Array, ""],
    v: Inexact[Array, " n"],
) -> Extended:
    """A Krylov space with `v` in its `j`-th row."""
    image = linear.forward(v)
    basis = basis.at[j].set(v)
    left, length = unit(image)
    following, size = unit(linear.adjoint(left))
    following, new = outside(basis, following)
    return Extended(basis, image, following, length, size * new)


def outside(
    basis: Inexact[Array, "k n"], v: Inexact[Array, " n"]
) -> tuple[Inexact[Array, " n"], Float[Array, ""]]:
    """The part of a unit vector that is orthogonal to all of `basis`, at norm one, and
    its norm. If only rounding is left, it is zero."""

    # Twice is enough.
    for _ in range(2):
        v = v - matmul(matmul(jnp.conj(basis), v), basis)
    v, norm = unit(v)
    is_rounding = norm < 10 * jnp.finfo(norm.dtype).eps
    return jnp.where(is_rounding, 0, v), jnp.where(is_rounding, 0, norm)


def top_eigenvector(matrix: Inexact[Array, "n n"]) -> Inexact[Array, " n"]:
    """Of a small positive semidefinite matrix, by squaring it over and over. If several
    eigenvalues are the largest, some vector of theirs."""

    def square(_, matrix):
        matrix = matrix / _size_or_one(matrix)
        return matmul(matrix, matrix)

    # The power 2^20: what is left of an eigenvalue that is by 1e-5 smaller is 1e-5.
    matrix = lax.fori_loop(0, 20, square, matrix)
    longest = jnp.argmax(jnp.sum(squared_magnitude(matrix), axis=0))
    return unit(matrix[:, longest])[0]


def _size_or_one(x: Inexact[Array, "..."]) -> Inexact[Array, ""]:
    """A number of the order of the entries of `x` that may be divided by."""
    size = jnp.max(jnp.abs(x), initial=0)
    return jnp.where(size > 0, size, 1).astype(x.dtype)


def gram(matrix: Inexact[Array, "m n"], rtol: float = 2e-5) -> Top:
    r"""Gram iteration: squares $G = A^H A$ until its Frobenius norm tells its largest
    eigenvalue,

    $$\sigma_1 \le \lVert G^{2^t} \rVert_F^{2^{-t-1}} \le r^{2^{-t-2}} \sigma_1.$$

    **Arguments:**

    - `matrix`: a matrix of rank $r$ at most.
    - `rtol`: how much above the truth the result may be, relatively, before rounding.

    **Returns:**

    An estimate that is not below the truth: a margin for rounding is in it, in float32
    of 2e-5 for small matrices, 8e-5 for 4096 rows or columns, 2.6e-4 for 65,536 and
    1e-3 for a million. It grows with the square root of the size, as the rounding error
    of a sum does; no proof covers a matrix made to round badly.

    ??? cite

        [Efficient Bound of Lipschitz Constant for Convolutional Layers by Gram
        Iteration](https://arxiv.org/abs/2305.16173), Delattre, Barthélemy, Araujo and
        Allauzen, 2023.
    """
    if matrix.size == 0:
        return empty_top(matrix.shape[0], matrix.shape[1], matrix.dtype)
    if matrix.shape[0] < matrix.shape[1]:
        return gram(adjoint(matrix), rtol).flipped
    rows, size = matrix.shape
    squarings = math.ceil(math.log2(max(math.log(max(size, 2)) / (4 * rtol), 1)))
    peak = _size_or_one(matrix)
    scaled = matrix / peak

    def frobenius(x):
        return jnp.sqrt(jnp.sum(squared_magnitude(x)))

    def nonzero(norm):
        return jnp.where(norm == 0, 1, norm)

    def square(t, carry):
        power, log_value = carry
        power = matmul(power, power)
        norm = nonzero(frobenius(power))
        log_value = log_value + jnp.log(norm) * 0.5 ** (t + 1).astype(norm.dtype)
        return power / norm.astype(power.dtype), log_value

    first = matmul(adjoint(scaled), scaled)
    norm = frobenius(first)
    carry = (first / nonzero(norm).astype(first.dtype), jnp.log(nonzero(norm)))
    power, log_value = lax.fori_loop(0, squarings, square, carry)
    eps = float(jnp.finfo(matrix.dtype).eps)
    margin = 8 * eps * (squarings + math.sqrt(max(rows, size)))
    value = jnp.exp(log_value / 2) * jnp.real(peak) * (1 + margin)
    value = jnp.where(norm == 0, 0, value)
    longest = jnp.argmax(jnp.sum(squared_magnitude(power), axis=0))
    left, _ = unit(matmul(scaled, unit(power[:, longest])[0]))
    right, _ = unit(matmul(adjoint(scaled), left))
    return Top(value, left, right)


def svd(matrix: Inexact[Array, "m n"]) -> Top:
    """By the singular value decomposition."""
    if matrix.size == 0:
        return empty_top(matrix.shape[0], matrix.shape[1], matrix.dtype)
    peak = _size_or_one(matrix)
    # LAPACK might not return from an infinity.
    finite = jnp.all(jnp.isfinite(matrix))
    scaled = jnp.where(finite, matrix / peak, 0)
    left, values, right = thin_svd(scaled)
    value = jnp.where(finite, values[0] * jnp.real(peak), jnp.nan)
    return Top(value, left[:, 0], jnp.conj(right[0]))
