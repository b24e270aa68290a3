"""The map that caps every singular value of a weight."""

from typing import get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Inexact

from .._linalg import Way, anywhere, cap, wide_dtype
from .._values import Bound, StoredBound, bound_value, check_bound
from ._checks import check_method
from ._matrix import (
    MatrixProjection,
    RowAxes,
    Rows,
    automatically_sharded,
    check_blocks,
    check_matrix,
    on_matrices,
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

    def _start(self, weight):
        return self._scaling._start(weight)

    def _step(self, weight, start):
        def step(weight, start):
            top = self._scaling.tops(weight, start)
            bound = bound_value(self.cap, top.value.dtype)
            near = anywhere(jnp.any(~(top.value < 0.9 * bound)))
            # Not `self`, which has no hash if its bound is traced.
            weight = lax.cond(near, lambda w: self(w), lambda w: w, weight)
            return weight, jax.vmap(next_start)(top, start)

        return automatically_sharded(step, weight, start)

    @property
    def _scaling(self) -> SpectralScale:
        return SpectralScale(self.cap, matrix=self.matrix, blocks=self.blocks)
