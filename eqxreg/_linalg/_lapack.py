r"""LAPACK's decompositions, of stacks of matrices. All calls of it are here.

In some versions of JAX, on a CPU, those of several matrices at once may wait for ever:
a kernel waits on a thread of a pool for other threads of the same pool, and where as
many wait as there are threads, none is left to work. So it is with an ensemble of
networks on two cores. There, one matrix is taken after the other.

What is found is a constant. Whoever calls knows the derivatives.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jax import lax
from jaxtyping import Array, Float, Inexact

from ._platforms import on_cpu
from ._products import matmul


# The first version whose kernels wait for a pool, and the first after them:
# https://github.com/jax-ml/jax/commit/859992407d
_FIRST, _MENDED = (0, 10, 0), (0, 11, 2)


def eigh(
    square: Inexact[Array, "*batch n n"],
) -> tuple[Float[Array, "*batch n"], Inexact[Array, "*batch n n"]]:
    """Eigenvalues, ascending, and eigenvectors of Hermitian matrices, by their lower
    triangles."""
    return _in_turn(lambda x: tuple(jnp.linalg.eigh(x, symmetrize_input=False)), square)


def eigvalsh(square: Inexact[Array, "*batch n n"]) -> Float[Array, "*batch n"]:
    """The eigenvalues alone."""
    return _in_turn(lambda x: jnp.linalg.eigvalsh(x, symmetrize_input=False), square)


def thin_svd(
    matrices: Inexact[Array, "*batch m n"],
) -> tuple[Inexact[Array, "*batch m k"], Float[Array, "*batch k"], Array]:
    """The thin singular value decompositions: `u`, `s`, and the adjoint of `v`."""
    return _in_turn(lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)), matrices)


def cholesky(square: Inexact[Array, "*batch n n"]) -> Inexact[Array, "*batch n n"]:
    """The lower triangles whose Gram matrices these are."""
    return _in_turn(jnp.linalg.cholesky, square)


def upper_triangle(tall: Inexact[Array, "*batch m n"]) -> Inexact[Array, "*batch n n"]:
    """The triangles of QR decompositions."""
    return _in_turn(lambda x: jnp.linalg.qr(x, mode="r"), tall)


def tridiagonal(
    square: Inexact[Array, "*batch n n"],
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch n-1"]]:
    """The diagonal, and what is beside it, of tridiagonal matrices with the eigenvalues
    of these Hermitian ones."""
    return _in_turn(lambda x: tuple(lax.linalg.tridiagonal(x)[1:3]), square)


def over(
    above: Inexact[Array, "*batch m n"], below: Inexact[Array, "*batch n n"]
) -> Inexact[Array, "*batch m n"]:
    """The solution of $X B = A$, differentiable in both."""
    factors = _in_turn(jax.scipy.linalg.lu_factor, below)

    def solved(trans: int, right: Array) -> Array:
        # LU solves for columns, and here are rows.
        columns = jnp.swapaxes(right, -1, -2)
        solve = lambda columns, *factors: jax.scipy.linalg.lu_solve(
            factors, columns, trans=trans
        )
        return jnp.swapaxes(_in_turn(solve, columns, *factors), -1, -2)

    return _divided(above, below, ft.partial(solved, 1), ft.partial(solved, 0))


def over_triangle(
    above: Inexact[Array, "*batch m n"], below: Inexact[Array, "*batch n n"]
) -> Inexact[Array, "*batch m n"]:
    """The solution of $X T = A$ for upper triangles $T$, differentiable in both."""

    def solved(transposed: bool, right: Array) -> Array:
        solve = ft.partial(lax.linalg.triangular_solve, transpose_a=transposed)
        return _in_turn(solve, below, right)

    return _divided(above, below, ft.partial(solved, False), ft.partial(solved, True))


def _divided(
    above: Array, below: Array, solve: Callable, transposed: Callable
) -> Array:
    return lax.custom_linear_solve(
        lambda x: matmul(x, below),
        above,
        lambda _, right: solve(right),
        lambda _, right: transposed(right),
    )


def _in_turn(fn: Callable, *stacks: Array) -> Any:
    """`fn(*stacks)`, where the first stack is one of matrices, and its batch axes are
    those of all."""
    stacks = lax.stop_gradient(stacks)
    if not _may_wait():
        return fn(*stacks)
    batch = stacks[0].shape[:-2]
    return _unmerged(batch, _one_by_one(fn, *_merged(len(batch), stacks)))


def _may_wait() -> bool:
    """Whether kernels of several matrices may wait for ever.

    With several CPU devices, of all processes, a stack may be in parts, which nothing
    here must gather; and those of one process have a larger pool.
    """
    if not _FIRST <= jax.__version_info__ < _MENDED:
        return False
    try:
        return len(jax.devices("cpu")) == 1
    except RuntimeError:  # There is no such device.
        return False


def _one_by_one(fn: Callable, *stacks: Array) -> Any:
    """`fn(*stacks)` for stacks with one axis before what `fn` is of. Under `vmap` that
    becomes longer."""

    @jax.custom_batching.custom_vmap
    def each(*stacks: Array) -> Any:
        if len(stacks[0]) <= 1:
            return fn(*stacks)
        in_turn = lambda *stacks: lax.map(lambda one: fn(*one), stacks)
        return on_cpu(in_turn, fn, *stacks)

    @each.def_vmap
    def _(axis_size: int, in_batched: list[bool], *stacks: Array) -> Any:
        full = [
            stack if batched else jnp.broadcast_to(stack, (axis_size, *stack.shape))
            for stack, batched in zip(stacks, in_batched, strict=True)
        ]
        batch = full[0].shape[:2]
        out = _unmerged(batch, _one_by_one(fn, *_merged(2, full)))
        return out, jax.tree.map(lambda _: True, out)

    return each(*stacks)


def _merged(count: int, stacks: Any) -> list[Array]:
    """The stacks, with the first `count` axes as one."""
    return [stack.reshape(-1, *stack.shape[count:]) for stack in stacks]


def _unmerged(batch: tuple[int, ...], out: Any) -> Any:
    return jax.tree.map(lambda array: array.reshape(*batch, *array.shape[1:]), out)
