"""Products and stacks of matrices."""

from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact


def matmul(a: Inexact[Array, "..."], b: Inexact[Array, "..."]) -> Array:
    """The matrix product in the full precision of its arguments, on accelerators too,
    where by default it is not."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def adjoint(matrix: Inexact[Array, "*batch m n"]) -> Inexact[Array, "*batch n m"]:
    """The conjugate transpose."""
    return jnp.conj(jnp.swapaxes(matrix, -1, -2))


Matrices: TypeAlias = Inexact[Array, "blocks m n"]


def as_tall(fn: Callable[..., Array], *matrices: Matrices) -> Matrices:
    """`fn` of matrices that have at least as many rows as columns."""
    rows, columns = matrices[0].shape[-2:]
    if rows < columns:
        return adjoint(fn(*map(adjoint, matrices)))
    return fn(*matrices)


def gram_of(tall: Matrices) -> Inexact[Array, "blocks n n"]:
    """$A^H A$."""
    return matmul(adjoint(tall), tall)


def eye_like(square: Inexact[Array, "*batch n n"]) -> Inexact[Array, "*batch n n"]:
    eye = jnp.eye(square.shape[-1], dtype=square.dtype)
    return jnp.broadcast_to(eye, square.shape)
