r"""Maps to matrices with orthonormal columns or, if they are wide, rows.

`Orthogonal` goes to the nearest one. `AlmostOrthogonal` is the cheap one: it only
promises a spectral norm of at most 1. For charts around a base point see `_charts.py`.
"""

import math
from typing import ClassVar, get_args

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Inexact

from .._linalg import (
    Way,
    adjoint,
    as_tall,
    gram_of,
    matmul,
    narrow,
    orthogonality_error,
    polar,
    squared_magnitude,
    tolerance,
    widen,
)
from ._checks import check_method
from ._matrix import (
    MatrixMap,
    MatrixProjection,
    RowAxes,
    Rows,
    check_blocks,
    check_matrix,
    on_matrices,
    to_matrices,
)


class Orthogonal(MatrixProjection):
    r"""The matrices with orthonormal columns, $W^H W = I$ or, if they are wide,
    orthonormal rows, $W W^H = I$.

    A matrix goes to the nearest one, its polar factor,

    $$U \Sigma V^H \mapsto U V^H.$$

    One that is orthogonal but for rounding keeps its bits. Where a singular value is
    zero there is no nearest one, and some orthonormal direction is chosen: the result
    is always orthogonal, also of a zero weight.

    There are two ways to compute it: the singular value decomposition, the default on
    CPUs, and matrix products only, by an iteration of Newton and Schulz, the default
    elsewhere, and everywhere for a matrix that is nearly orthogonal already. The
    derivative is that of the map, by a factorisation in either case; on the set it is
    the projection onto the tangent space. Directions of no length, relatively, have
    none.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> weight = jnp.array([[0.0, 3.0], [-0.5, 0.0]])
        >>> with jnp.printoptions(precision=3, suppress=True):
        ...     print(eqxreg.Orthogonal()(weight) + 0.0)
        [[ 0.  1.]
         [-1.  0.]]

        ```
    """

    matrix: Rows = eqx.field(static=True)
    blocks: int = eqx.field(static=True)
    method: Way | None = eqx.field(static=True)
    _degree: ClassVar[int | None] = 0

    def __init__(
        self,
        *,
        matrix: RowAxes = "unit",
        blocks: int = 1,
        method: Way | None = None,
    ):
        """**Arguments:**

        - `matrix`, `blocks`: as in [`eqxreg.SpectralNorm`][]. (Keyword only arguments.)
        - `method`: `"factorisation"`, `"products"`, or `None` for what suits the
            platform. Defaults to `None`. (Keyword only argument.)

        **Raises:**

        - `ValueError`: if `matrix`, `blocks` or `method` is none of the above or, when
            called, if the weight's rank is below 2 or `blocks` does not divide its
            rows.
        """
        self.matrix = check_matrix(matrix)
        self.blocks = check_blocks(blocks)
        self.method = check_method(method, get_args(Way), "what suits the platform")

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        self.check(raw)
        tol = tolerance(raw.dtype)
        return on_matrices(self, lambda m: polar(m, tol, self.method), raw)

    def contains(
        self, weight: Inexact[Array, "..."], tol: ArrayLike | None = None
    ) -> Bool[Array, ""]:
        tol = tolerance(weight.dtype) if tol is None else tol
        matrices = to_matrices(weight, self.matrix, self.blocks)
        wide = widen(matrices)
        is_tall = wide.shape[-2] >= wide.shape[-1]
        gram = gram_of(wide if is_tall else adjoint(wide))
        return jnp.all(orthogonality_error(gram) <= tol)


class AlmostOrthogonal(MatrixMap):
    r"""Matrices of spectral norm at most 1, by one matrix product: the columns of a
    tall matrix, or the rows of a wide one, are scaled,

    $$W \mapsto W D, \qquad
    D_{jj} = \Big(\sum_i \big|W^H W\big|_{ij}\Big)^{-1/2}.$$

    The result is orthogonal if the columns of $W$ are orthogonal to each other, and
    training drives them there. A column of zeros stays zero.

    A convolution's kernel counts as the matrix of its filters, and what is at most 1 is
    the norm of that. The convolution may stretch an image by more: by 1.3 to 3 for
    kernels of 3 x 3.

    Not every matrix of norm at most 1 is a result. Wrapping a layer keeps its weight if
    it is one, and otherwise multiplies it by a number (by several, if its columns fall
    into parts that are orthogonal to each other).

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> weight = jnp.array([[3.0, 3.0], [0.0, 3.0]])
        >>> with jnp.printoptions(precision=3):
        ...     print(eqxreg.AlmostOrthogonal()(weight))
        [[0.707 0.577]
         [0.    0.577]]

        ```

    ??? cite

        [Almost-Orthogonal Layers for Efficient General-Purpose Lipschitz
        Networks](https://arxiv.org/abs/2208.03160), Prach and Lampert.
    """

    matrix: Rows = eqx.field(static=True)
    blocks: int = eqx.field(static=True)
    _degree: ClassVar[int | None] = 0

    def __init__(self, *, matrix: RowAxes = "unit", blocks: int = 1):
        """**Arguments:**

        - `matrix`, `blocks`: as in [`eqxreg.SpectralNorm`][]. (Keyword only arguments.)

        **Raises:**

        - `ValueError`: if `matrix` or `blocks` is not valid or, when called, if the
            weight's rank is below 2 or `blocks` does not divide its rows.
        """
        self.matrix = check_matrix(matrix)
        self.blocks = check_blocks(blocks)

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        self.check(raw)
        return on_matrices(self, _almost_orthogonal, raw)

    def inverse(self, weight: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        r"""**Arguments:**

        - `weight`: a result of this map.

        **Returns:**

        A raw weight $W S$ that this map sends to `weight`: with $S_{jj}$ the positive
        eigenvector of $|W^H W|$ to the eigenvalue 1. Of other weights, one that it
        sends to a multiple of `weight`.
        """
        self.check(weight)
        return on_matrices(self, _undo_almost_orthogonal, weight)


def _almost_orthogonal(matrices: Array) -> Array:
    def scaled(tall):
        # The result does not depend on the size of the matrix.
        tall = tall / lax.stop_gradient(_peak(tall))
        sums = _sums(tall)
        nonzero = sums > 0
        factor = jnp.where(nonzero, lax.rsqrt(jnp.where(nonzero, sums, 1)), 1)
        eps = float(jnp.finfo(sums.dtype).eps)
        factor = factor * (1 - (8 + math.sqrt(tall.shape[-1])) * eps)
        return tall * factor[..., None, :].astype(tall.dtype)

    return narrow(as_tall(scaled, widen(matrices)), matrices.dtype)


def _undo_almost_orthogonal(matrices: Array) -> Array:
    def scaled(tall):
        power = jnp.abs(gram_of(tall / _peak(tall)))
        eye = jnp.eye(power.shape[-1], dtype=power.dtype)
        power = power / _peak(power) + eye[None]
        for _ in range(10):
            power = matmul(power, power)
            power = power / _peak(power)
        eigenvector = jnp.sum(power, axis=-1)
        eigenvector = eigenvector / jnp.max(eigenvector, axis=-1, keepdims=True)
        # Parts with smaller eigenvalues have vanished, and count for themselves.
        size = jnp.maximum(eigenvector, 1e-6)
        return tall * size[..., None, :].astype(tall.dtype)

    return as_tall(scaled, widen(matrices)).astype(matrices.dtype)


def _sums(tall: Array) -> Array:
    r"""$\sum_i |W^H W|_{ij}$, with a derivative where an inner product is zero."""
    gram = gram_of(tall)
    squares = squared_magnitude(gram)
    nonzero = squares > 0
    sizes = jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, squares, 1)), 0)
    return jnp.sum(sizes, axis=-2)


def _peak(matrices: Array) -> Array:
    peak = jnp.max(jnp.abs(matrices), axis=(-1, -2), keepdims=True, initial=0)
    return jnp.where(peak > 0, peak, 1).astype(matrices.dtype)
