r"""Maps to matrices of a given structure: symmetric, semidefinite, of low rank.

The nearest points and their derivatives are in `_linalg`.
"""

import functools as ft
from typing import ClassVar

import equinox as eqx
import numpy as np
from jaxtyping import Array, Inexact

from .._linalg import (
    adjoint,
    as_tall,
    mean_with,
    minus_adjoint,
    nearest_of_rank,
    nearest_semidefinite,
)
from ._matrix import (
    MatrixProjection,
    RowAxes,
    Rows,
    SquareProjection,
    check_blocks,
    check_matrix,
    matrix_shape,
    on_matrices,
)


class Symmetric(SquareProjection):
    r"""The symmetric matrices, or for a complex weight the Hermitian ones:
    $W \mapsto (W + W^H) / 2$.

    A weight that is symmetric keeps its bits. The derivative is the same map.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> print(eqxreg.Symmetric()(jnp.array([[1.0, 2.0], [4.0, 3.0]])))
        [[1. 3.]
         [3. 3.]]

        ```
    """

    matrix: Rows = eqx.field(static=True)
    blocks: int = eqx.field(static=True)
    _degree: ClassVar[int | None] = 1

    def __init__(self, *, matrix: RowAxes = "unit", blocks: int = 1):
        """**Arguments:**

        - `matrix`: which axes are the rows of the matrix: `"unit"` for axis 0, an int
            or a tuple of ints. The others are its columns. Defaults to `"unit"`.
            (Keyword only argument.)
        - `blocks`: the number of equal blocks of rows that are matrices of their own: 3
            for a GRU's fused weights, 4 for an LSTM's. Defaults to 1. (Keyword only
            argument.)

        **Raises:**

        - `ValueError`: if `matrix` or `blocks` is none of the above.
        """
        self.matrix = check_matrix(matrix)
        self.blocks = check_blocks(blocks)

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        self.check(raw)
        return on_matrices(self, ft.partial(mean_with, adjoint), raw)


class SkewSymmetric(SquareProjection):
    r"""The skew-symmetric matrices, or for a complex weight the skew-Hermitian ones:
    $W \mapsto (W - W^H) / 2$.

    A weight that is skew-symmetric keeps its bits. The derivative is the same map.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> print(eqxreg.SkewSymmetric()(jnp.array([[1.0, 2.0], [4.0, 3.0]])))
        [[ 0. -1.]
         [ 1.  0.]]

        ```
    """

    matrix: Rows = eqx.field(static=True)
    blocks: int = eqx.field(static=True)
    _degree: ClassVar[int | None] = 1

    def __init__(self, *, matrix: RowAxes = "unit", blocks: int = 1):
        """**Arguments:**

        - `matrix`, `blocks`: the matrices of a weight, as in [`eqxreg.Symmetric`][].
            (Keyword only arguments.)

        **Raises:**

        - `ValueError`: if `matrix` or `blocks` is unknown.
        """
        self.matrix = check_matrix(matrix)
        self.blocks = check_blocks(blocks)

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        self.check(raw)
        return on_matrices(self, ft.partial(mean_with, minus_adjoint), raw)


class PositiveSemidefinite(SquareProjection):
    r"""The symmetric (or Hermitian) matrices without negative eigenvalues.

    With the eigendecomposition $(W + W^H) / 2 = V \Lambda V^H$, the nearest one is

    $$W \mapsto V \max(\Lambda, 0) V^H.$$

    A weight that is symmetric and has, to rounding, no negative eigenvalue keeps its
    bits; there, the derivative is the symmetric part. Others get a multiple of the
    identity on top, of the size of rounding errors, so that none of them makes an
    eigenvalue negative.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> weight = jnp.array([[0.0, 2.0], [2.0, 0.0]])
        >>> with jnp.printoptions(precision=3):
        ...     print(eqxreg.PositiveSemidefinite()(weight))
        [[1. 1.]
         [1. 1.]]

        ```
    """

    matrix: Rows = eqx.field(static=True)
    blocks: int = eqx.field(static=True)
    _degree: ClassVar[int | None] = 1

    def __init__(self, *, matrix: RowAxes = "unit", blocks: int = 1):
        """**Arguments:**

        - `matrix`, `blocks`: the matrices of a weight, as in [`eqxreg.Symmetric`][].
            (Keyword only arguments.)

        **Raises:**

        - `ValueError`: if `matrix` or `blocks` is unknown.
        """
        self.matrix = check_matrix(matrix)
        self.blocks = check_blocks(blocks)

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        self.check(raw)
        return on_matrices(self, nearest_semidefinite, raw)


class LowRank(MatrixProjection):
    r"""The matrices of rank at most `rank`: the sum of the first `rank` terms of the
    singular value decomposition,

    $$W = \sum_i \sigma_i u_i v_i^H \mapsto \sum_{i \le r} \sigma_i u_i v_i^H.$$

    A weight of this rank, to rounding in its dtype, keeps its bits; there, the
    derivative is the projection onto the tangent space. If $\sigma_r = \sigma_{r+1}$
    the nearest matrix is not unique: the result is one of the nearest, and the
    derivative leaves out what is infinite.

    The set is not convex. The average of two weights of low rank is none.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> weight = jnp.array([[3.0, 1.0], [1.0, 3.0]])
        >>> with jnp.printoptions(precision=3):
        ...     print(eqxreg.LowRank(1)(weight))
        [[2. 2.]
         [2. 2.]]

        ```
    """

    rank: int = eqx.field(static=True)
    matrix: Rows = eqx.field(static=True)
    blocks: int = eqx.field(static=True)
    _degree: ClassVar[int | None] = 1

    def __init__(
        self, rank: int | np.integer, *, matrix: RowAxes = "unit", blocks: int = 1
    ):
        """**Arguments:**

        - `rank`: the largest rank $r$, a positive int. One that no matrix of the weight
            can exceed makes the map the identity.
        - `matrix`, `blocks`: the matrices of a weight, as in [`eqxreg.Symmetric`][].
            They need not be square. (Keyword only arguments.)

        **Raises:**

        - `ValueError`: if `rank` is not a positive int, or `matrix` or `blocks` is
            unknown.
        """
        is_int = isinstance(rank, int | np.integer) and not isinstance(rank, bool)
        if not is_int or rank < 1:
            raise ValueError(
                "`rank` must be a positive int, the largest rank that a matrix may "
                f"have, got {rank!r}."
            )
        self.rank = int(rank)
        self.matrix = check_matrix(matrix)
        self.blocks = check_blocks(blocks)

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        self.check(raw)

        _, rows, columns = matrix_shape(raw.shape, self.matrix, self.blocks)
        if self.rank >= min(rows, columns):
            return raw
        nearest = ft.partial(nearest_of_rank, self.rank)
        return on_matrices(self, ft.partial(as_tall, nearest), raw)
