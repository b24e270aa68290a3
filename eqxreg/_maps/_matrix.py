"""Weights as matrices: which axes are rows, and which blocks are matrices of their own.

Every spectral, orthogonal and structured map is a `MatrixMap`: it is written for a
stack of matrices, and this file makes that stack from a weight and back.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Inexact

from .._linalg import Matrices, check_axis, resolve_axes
from .._values import Shaped
from ._base import Parametrization, Projection
from ._checks import check_dtype


Rows: TypeAlias = str | int | tuple[int, ...]
"""`"unit"`, or the axes that are the rows."""

RowAxes: TypeAlias = str | SupportsIndex | Sequence[SupportsIndex]
"""What `Rows` may be given as."""


class MatrixMap(Parametrization):
    """A map that sees a weight as matrices."""

    matrix: eqx.AbstractVar[Rows]
    blocks: eqx.AbstractVar[int]

    def check(self, weight: Shaped) -> None:
        check_dtype(weight)
        matrix_shape(weight.shape, self.matrix, self.blocks)


class MatrixProjection(MatrixMap, Projection):
    """A projection that sees a weight as matrices."""


class SquareProjection(MatrixProjection):
    """A projection of square matrices."""

    def check(self, weight: Shaped) -> None:
        check_square(self, weight)


def check_square(p: MatrixMap, weight: Shaped) -> None:
    """Raises unless the matrices of this weight are square."""
    check_dtype(weight)
    _, rows, columns = matrix_shape(weight.shape, p.matrix, p.blocks)
    if rows != columns:
        raise ValueError(
            f"`{type(p).__name__}` needs a square matrix, and a weight of shape "
            f"{weight.shape} is {rows} by {columns} (`matrix={p.matrix!r}`, "
            f"`blocks={p.blocks}`). For fused weights, such as those of recurrent "
            "cells, say how many blocks there are: 3 for a GRU's, 4 for an LSTM's."
        )


def check_matrix(matrix: Any) -> Rows:
    """`matrix` in its canonical form, or an error that lists the forms there are."""
    try:
        rows = check_axis(matrix)
    except ValueError:
        rows = None
    if rows is None:
        raise ValueError(
            '`matrix` says which axes are the rows: "unit" (axis 0), an int, or a '
            f"tuple of different ints, got {matrix!r}."
        )
    return rows


def check_blocks(blocks: Any) -> int:
    """`blocks` as an int, or an error."""
    is_int = isinstance(blocks, int | np.integer) and not isinstance(blocks, bool)
    if not is_int or blocks < 1:
        raise ValueError(
            "`blocks` must be a positive int, the number of equal blocks of rows that "
            f"are matrices of their own, got {blocks!r}."
        )
    return int(blocks)


def matrix_shape(
    shape: Sequence[int], matrix: Rows, blocks: int
) -> tuple[int, int, int]:
    """The shape `(blocks, rows, columns)` of a weight of this shape as matrices."""
    rows = _row_axes(shape, matrix)
    total = math.prod(shape[a] for a in rows)
    if total % blocks:
        raise ValueError(
            f"`blocks={blocks}` must divide the {total} rows of a weight of shape "
            f"{tuple(shape)}."
        )
    columns = math.prod(n for a, n in enumerate(shape) if a not in rows)
    return blocks, total // blocks, columns


def to_matrices(weight: Inexact[Array, "..."], matrix: Rows, blocks: int) -> Matrices:
    """A weight as its matrices."""
    rows = _row_axes(weight.shape, matrix)
    first = jnp.moveaxis(weight, rows, range(len(rows)))
    return first.reshape(matrix_shape(weight.shape, matrix, blocks))


def from_matrices(
    matrices: Matrices, shape: Sequence[int], matrix: Rows
) -> Inexact[Array, "..."]:
    """The weight of this shape that has these matrices."""
    rows = _row_axes(shape, matrix)
    others = [a for a in range(len(shape)) if a not in rows]
    first = matrices.reshape([shape[a] for a in (*rows, *others)])
    return jnp.moveaxis(first, range(len(rows)), rows)


def on_matrices(
    p: MatrixMap, fn: Callable[[Array], Array], weight: Inexact[Array, "*shape"]
) -> Inexact[Array, "*shape"]:
    """`fn`, of matrices, on a weight as `p` sees it."""

    def mapped(weight: Array) -> Array:
        matrices = to_matrices(weight, p.matrix, p.blocks)
        return from_matrices(fn(matrices), weight.shape, p.matrix)

    return automatically_sharded(mapped, weight)


# On a mesh with explicit axes, JAX asks of every matrix product how its result is to be
# laid out. In what follows the compiler may decide.


def automatically_sharded(
    fn: Callable, weight: Inexact[Array, "..."], *others: Array
) -> Any:
    """`fn(weight, *others)`, which is a weight laid out as this one or, if there are
    others, a weight and something small. An empty weight stays, and so do the others:
    nothing is to be done to it, and decompositions don't know what."""
    if weight.size == 0:
        return (weight, *others) if others else weight
    sharding = jax.typeof(weight).sharding
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    return _automatically(
        fn, (sharding, whole) if others else sharding, weight, *others
    )


def automatically_measured(
    fn: Callable, weight: Inexact[Array, "..."], *others: Array
) -> Any:
    """`fn(weight, *others)`, which is small."""
    whole = NamedSharding(jax.typeof(weight).sharding.mesh, PartitionSpec())
    return _automatically(fn, whole, weight, *others)


def _automatically(fn: Callable, shardings: Any, weight: Array, *others: Array) -> Any:
    if AxisType.Explicit not in jax.typeof(weight).sharding.mesh.axis_types:
        return fn(weight, *others)
    return jax.sharding.auto_axes(fn, out_sharding=shardings)(weight, *others)


def over_blocks(fn: Callable, *args: Array) -> Any:
    """`fn` of each block. A single one is not worth a `vmap`, which would run both
    sides of every `lax.cond` within."""
    if args[0].shape[0] == 1:
        result = fn(*(a[0] for a in args))
        return jax.tree.map(lambda x: x[None], result)
    return jax.vmap(fn)(*args)


def _row_axes(shape: Sequence[int], matrix: Rows) -> tuple[int, ...]:
    ndim = len(shape)
    if ndim < 2:
        raise ValueError(
            "A matrix needs a weight of rank 2 or more, got one of shape "
            f"{tuple(shape)}."
        )
    if matrix == "unit":
        return (0,)
    return resolve_axes(matrix, ndim)
