"""The map that caps every singular value of a weight."""

from typing import get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Inexact

from .._linalg import (
    Way,
    anywhere,
    by_platform,
    cap,
    excess,
    frobenius_norm,
    wide_dtype,
    widen,
)
from .._values import Bound, StoredBound, bound_value, check_bound
from ._base import boundary_slack, share
from ._checks import check_method
from ._matrix import (
    MatrixProjection,
    RowAxes,
    Rows,
    automatically_measured,
    automatically_sharded,
    check_blocks,
    check_matrix,
    matrix_shape,
    on_matrices,
    to_matrices,
)
from ._scale_norm import next_start
from ._spectral import SpectralScale


class SpectralCap(MatrixProjection):
    r"""The weights with all singular values at most `cap`: those above it are lowered
    to it, the others are left alone,

    $$U \Sigma V^H \mapsto U \min(\Sigma, c) V^H.$$

    This is the Euclidean projection onto the ball of the spectral norm. A matrix inside
    keeps its bits.

    There are two ways to compute it. A factorisation, the eigendecomposition of
    $W^H W$, is the default on CPUs; matrix products only, by an iteration of Newton and
    Schulz, the default elsewhere. The derivative is that of the map, by a factorisation
    in either case, and is finite everywhere; what is at the bound counts as inside.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> weight = jnp.array([[3.0, 0.0], [0.0, 1.0]])
        >>> with jnp.printoptions(precision=3):
        ...     print(eqxreg.SpectralCap(1.5)(weight))
        [[1.5 0. ]
         [0.  1. ]]

        ```
    """

    cap: StoredBound
    matrix: Rows = eqx.field(static=True)
    blocks: int = eqx.field(static=True)
    method: Way | None = eqx.field(static=True)

    def __init__(
        self,
        cap: Bound = 1.0,
        *,
        matrix: RowAxes = "unit",
        blocks: int = 1,
        method: Way | None = None,
    ):
        """**Arguments:**

        - `cap`: the bound $c$: a positive number, JAX scalar array or schedule.
            Defaults to 1.
        - `matrix`, `blocks`: as in [`eqxreg.SpectralNorm`][]. (Keyword only arguments.)
        - `method`: `"factorisation"`, `"products"`, or `None` for what suits the
            platform. Defaults to `None`. (Keyword only argument.)

        **Raises:**

        - `ValueError`: if `cap` is not positive and finite, `matrix`, `blocks` or
            `method` is none of the above, or, when called, if the weight's rank is
            below 2 or `blocks` does not divide its rows.
        """
        self.cap = check_bound(cap, "cap", minimum=0, strict=True)
        self.matrix = check_matrix(matrix)
        self.blocks = check_blocks(blocks)
        self.method = check_method(method, get_args(Way), "what suits the platform")

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        self.check(raw)
        bound = bound_value(self.cap, wide_dtype(raw.dtype))
        return on_matrices(self, lambda m: cap(m, bound, self.method), raw)

    def contains(
        self, weight: Inexact[Array, "..."], tol: ArrayLike | None = None
    ) -> Bool[Array, ""]:
        return self._scaling.contains(weight, tol)

    def _sizes(self, weight: Inexact[Array, "..."]) -> Float[Array, ""]:
        return self._scaling._sizes(weight)

    def _largest(self, weight: Inexact[Array, "..."]) -> Float[Array, ""]:
        return self._scaling._largest(weight)

    def _standing(self, weight):
        self.check(weight)
        _, *sides = matrix_shape(weight.shape, self.matrix, self.blocks)
        in_rows = self.matrix in ("unit", 0, (0,))
        # A subclass that has a `__call__` of its own may be anything.
        is_cap = type(self).__call__ is SpectralCap.__call__
        if not (in_rows and is_cap and min(sides) >= _LARGE):
            return self._by_capping(weight)
        return automatically_measured(lambda w: _standing(self, w), weight)

    def _active(self, weight):
        return self._standing(weight)[1]

    def _by_capping(self, weight):
        return self._wide_distance(weight), super()._active(weight)

    def _by_values(self, weight):
        matrices = to_matrices(weight, self.matrix, self.blocks)
        bound = bound_value(self.cap, wide_dtype(weight.dtype))
        found = excess(matrices, bound, boundary_slack(weight.dtype))
        active = found.is_near[:, None] & jnp.any(matrices != 0, axis=-1)
        known = frobenius_norm(found.distance), share(active, widen(matrices))
        is_sure = anywhere(jnp.all(found.is_sure))
        # Not `self`, which has no hash if its bound is traced.
        return lax.cond(is_sure, lambda _: known, lambda w: self._by_capping(w), weight)

    def _start(self, weight):
        return self._scaling._start(weight)

    def _step(self, weight, start):
        def step(weight, start):
            top, near = self._looked_at(weight, start)
            # Not `self`, which has no hash if its bound is traced.
            weight = lax.cond(near, lambda w: self(w), lambda w: w, weight)
            return weight, jax.vmap(next_start)(top, start)

        return automatically_sharded(step, weight, start)

    def _looked_at(self, weight, start):
        """The largest singular values, where they are not well below the bound, and
        whether any is not."""
        top = self._scaling.tops(weight, start)
        bound = bound_value(self.cap, top.value.dtype)
        return top, anywhere(jnp.any(~(top.value < 0.9 * bound)))

    @property
    def _scaling(self) -> SpectralScale:
        return SpectralScale(self.cap, matrix=self.matrix, blocks=self.blocks)


_LARGE = 128
"""The number of rows and columns from which on it is worth knowing where a weight is
relative to the set without capping it."""


# Compiled as a whole, for outside of `jit` a `cond` is compiled anew in every call.
@eqx.filter_jit
def _standing(p: SpectralCap, weight: Inexact[Array, "..."]) -> tuple[Array, Array]:
    _, near = p._looked_at(weight, p._scaling.cold_start(weight))

    def outside(weight):
        ways = p._by_values, p._by_capping
        return by_platform(p.method, *ways, weight)

    def inside(weight):
        none = jnp.zeros((), wide_dtype(weight.dtype))
        return none, none

    return lax.cond(near, outside, inside, weight)
