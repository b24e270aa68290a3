r"""Maps that bound the largest singular value of a weight.

`SpectralNorm` and `SpectralScale` scale a matrix by one number, as `_scale_norm.py`
does it, and `spectral_norm` only measures. `SpectralCap`, in `_spectral_cap.py`, moves
each singular value by itself.
"""

import abc
from typing import ClassVar, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Inexact

from .._linalg import Top, fixed_vector, real_dtype, tolerance, wide_dtype, widen
from .._values import Bound, StoredBound, bound_value, check_bound
from ._checks import check_method
from ._factored import OnlyMultiplied, is_factorable
from ._matrix import (
    MatrixProjection,
    RowAxes,
    Rows,
    automatically_measured,
    automatically_sharded,
    check_blocks,
    check_matrix,
    from_matrices,
    to_matrices,
)
from ._rescale import at_most, exactly
from ._scale_norm import (
    ESTIMATORS,
    Estimator,
    Measure,
    Target,
    block_factors,
    block_values,
    next_start,
    scaled_blocks,
    settled_blocks,
    sure,
    warm,
)


class _SpectralScaling(MatrixProjection):
    """What `SpectralNorm` and `SpectralScale` share: the weight is multiplied by one
    number for each of its matrices."""

    matrix: Rows = eqx.field(static=True)
    blocks: int = eqx.field(static=True)
    method: str | None = eqx.field(static=True)

    def __init__(self, matrix: RowAxes, blocks: int, method: str | None):
        self.matrix = check_matrix(matrix)
        self.blocks = check_blocks(blocks)
        self.method = check_method(method, get_args(Estimator), "lanczos")

    @property
    def _measure(self) -> Measure:
        return ESTIMATORS[self.method or "lanczos"]

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        self.check(raw)
        return self.measured(raw, self._measure, self.cold_start(raw))[0]

    def cold_start(self, weight: Inexact[Array, "..."]) -> Inexact[Array, "blocks n"]:
        """Vectors to start from, one for each matrix."""
        matrices = jax.eval_shape(lambda w: widen(self._matrices(w)), weight)
        blocks, _, columns = matrices.shape
        start = fixed_vector(columns, matrices.dtype)
        return jnp.broadcast_to(start, (blocks, columns))

    def measured(
        self,
        raw: Inexact[Array, "*shape"],
        measure: Measure,
        starts: Inexact[Array, "blocks n"],
    ) -> tuple[Inexact[Array, "*shape"], Inexact[Array, "blocks n"]]:
        """The map, with the norms of the matrices as measured from some vectors, and
        the vectors to start from next time."""
        target = self.plan(raw.dtype)

        def scaled(raw: Array, starts: Array) -> tuple[Array, Array]:
            matrices, starts = scaled_blocks(
                measure, target.plan, target.bound, self._matrices(raw), starts
            )
            return from_matrices(matrices, raw.shape, self.matrix), starts

        return automatically_sharded(scaled, raw, starts)

    def factored(
        self,
        raw: Inexact[Array, "..."],
        measure: Measure,
        starts: Inexact[Array, "blocks n"],
    ) -> tuple[OnlyMultiplied | None, Inexact[Array, "blocks n"]]:
        """As `measured`, if the weight may stay as it is and its products be scaled."""
        target = self.plan(raw.dtype)
        if self.matrix not in ("unit", 0, (0,)) or not is_factorable(raw):
            return None, starts

        def scaled(raw: Array, starts: Array) -> tuple[Array, Array]:
            factors, starts = block_factors(
                measure, target.plan, target.bound, self._matrices(raw), starts
            )
            rows = 1 if self.blocks == 1 else len(raw) // self.blocks
            return jnp.repeat(factors, rows)[:, None], starts

        factor, starts = automatically_measured(scaled, raw, starts)
        return OnlyMultiplied(raw, factor), starts

    def _factored(self, raw: Inexact[Array, "..."]) -> OnlyMultiplied | None:
        return self.factored(raw, self._measure, self.cold_start(raw))[0]

    def _start(self, weight):
        measure, cold_start = ESTIMATORS["lanczos"], self.cold_start(weight)
        return self.measured(weight, measure, cold_start)[1]

    def _step(self, weight, start):
        return self.measured(weight, sure(), start)

    def _matrices(self, weight: Array) -> Array:
        return to_matrices(weight, self.matrix, self.blocks)

    def singular_values(self, weight: Inexact[Array, "..."]) -> Float[Array, " blocks"]:
        """The largest singular value of each matrix."""

        def values(weight):
            matrices = widen(self._matrices(weight))
            return block_values(self._measure, matrices, self.cold_start(weight))

        return automatically_measured(values, weight)

    def _sizes(self, weight: Inexact[Array, "..."]) -> Float[Array, ""]:
        """The norm that is bounded, to be multiplied with a bound."""
        return self.singular_values(weight)[0]

    def _largest(self, weight: Inexact[Array, "..."]) -> Float[Array, ""]:
        return jnp.max(self.singular_values(weight), initial=0)

    @abc.abstractmethod
    def plan(self, dtype) -> Target:
        """What norm a weight of this dtype is to have."""


class SpectralNorm(_SpectralScaling):
    r"""The weights of spectral norm exactly `norm`: the matrix is divided by its
    largest singular value,

    $$W \mapsto \frac{c\, W}{\sigma_1(W)}.$$

    The singular value is computed anew in every call, from a fixed start, to a relative
    error of 1e-3 at most and far less as a rule: the map has no state and goes
    anywhere, into `eqx.nn.MLP`, recurrent cells or `jax.lax.scan`. At a few dozen
    matrix-vector products it is not for free; [`eqxreg.SpectralNormConstraint`][] needs
    two, for it remembers the singular vectors.

    The gradient is $\frac{c}{\sigma_1} (G - \frac{1}{\sigma_1} \langle W, G \rangle\,
    u_1 v_1^H)$, and has gradients itself. A zero weight stays zero, with the gradient
    of the identity.

    Weights of any size are right, as long as $c / \sigma_1$ is a normal number: in
    single precision up to $\sigma_1 = 8 \cdot 10^{37} c$, beyond which the result is
    NaN. Entries below the normal numbers, 1.2e-38, count as zero.

    A convolution's kernel counts as the matrix of its filters, whose norm is less than
    that of the convolution, by a factor of up to the square root of the number of
    pixels of the kernel. For the convolution itself, at one size of images or at every
    one, use [`eqxreg.SpectralNormConstraint`][] with its `input_shape`.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> weight = jnp.array([[3.0, 0.0], [0.0, 1.0]])
        >>> with jnp.printoptions(precision=3):
        ...     print(eqxreg.SpectralNorm(1.5)(weight))
        [[1.5 0. ]
         [0.  0.5]]

        ```

    ??? cite

        [Spectral Normalization for Generative Adversarial
        Networks](https://arxiv.org/abs/1802.05957), Miyato, Kataoka, Koyama and
        Yoshida.
    """

    norm: StoredBound
    _degree: ClassVar[int | None] = 0

    def __init__(
        self,
        norm: Bound = 1.0,
        *,
        matrix: RowAxes = "unit",
        blocks: int = 1,
        method: Estimator | None = None,
    ):
        """**Arguments:**

        - `norm`: the spectral norm $c$: a positive number, JAX scalar array or
            schedule. Defaults to 1.
        - `matrix`: which axes are the rows of the matrix; the others, flattened, are
            its columns. `"unit"`, axis 0, is right for all layers of Equinox. (Keyword
            only argument.)
        - `blocks`: the number of equal blocks of rows that are matrices of their own: 3
            for the fused gates of a GRU, 4 for those of an LSTM, `groups` for a grouped
            convolution. Defaults to 1. (Keyword only argument.)
        - `method`: how the singular value is found: `"lanczos"`; `"gram"`, by matrix
            products, which is never below the truth, and above it by at most 1e-4 for
            up to 4096 rows and columns, and 3e-4 for 65,536 (2e-5 in double precision);
            or `"svd"`. Defaults to `"lanczos"`. (Keyword only argument.)

        **Raises:**

        - `ValueError`: if `norm` is not positive and finite, `matrix`, `blocks` or
            `method` is none of the above, or, when called, if the weight's rank is
            below 2 or `blocks` does not divide its rows.
        """
        self.norm = check_bound(norm, "norm", minimum=0, strict=True)
        super().__init__(matrix, blocks, method)

    def plan(self, dtype) -> Target:
        return Target(exactly, bound_value(self.norm, wide_dtype(dtype)))

    def contains(
        self, weight: Inexact[Array, "..."], tol: ArrayLike | None = None
    ) -> Bool[Array, ""]:
        tol = tolerance(weight.dtype) if tol is None else tol
        values = self.singular_values(weight)
        bound = bound_value(self.norm, values.dtype)
        return jnp.all(jnp.abs(values - bound) <= tol * bound)


class SpectralScale(_SpectralScaling):
    r"""The weights of spectral norm at most `cap`: if the largest singular value is
    above it, the whole matrix is scaled down,

    $$W \mapsto W \min\left(1, \frac{c}{\sigma_1(W)}\right).$$

    Cheaper than [`eqxreg.SpectralCap`][], which is the nearest point of the same set.
    All else is as in [`eqxreg.SpectralNorm`][], and
    [`eqxreg.SpectralScaleConstraint`][] is the one that remembers. Since the singular
    value is found from below, the result may be above `cap` by the error of that, 1e-3
    at most and far less as a rule; with `method="gram"` it is never above.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> weight = jnp.array([[3.0, 0.0], [0.0, 1.0]])
        >>> with jnp.printoptions(precision=3):
        ...     print(eqxreg.SpectralScale(1.5)(weight))
        [[1.5 0. ]
         [0.  0.5]]

        ```
    """

    cap: StoredBound

    def __init__(
        self,
        cap: Bound = 1.0,
        *,
        matrix: RowAxes = "unit",
        blocks: int = 1,
        method: Estimator | None = None,
    ):
        """**Arguments:**

        - `cap`: the bound $c$: a positive number, JAX scalar array or schedule.
            Defaults to 1.
        - `matrix`, `blocks`, `method`: as in [`eqxreg.SpectralNorm`][]. (Keyword only
            arguments.)

        **Raises:**

        - As [`eqxreg.SpectralNorm`][] does.
        """
        self.cap = check_bound(cap, "cap", minimum=0, strict=True)
        super().__init__(matrix, blocks, method)

    def plan(self, dtype) -> Target:
        return Target(at_most, bound_value(self.cap, wide_dtype(dtype)))

    def contains(
        self, weight: Inexact[Array, "..."], tol: ArrayLike | None = None
    ) -> Bool[Array, ""]:
        tol = tolerance(weight.dtype) if tol is None else tol
        values = self.singular_values(weight)
        return jnp.all(values <= bound_value(self.cap, values.dtype) * (1 + tol))

    # Much of the time a projection after the update finds a matrix that is well inside,
    # and a few products are enough to see that. So it is for `SpectralCap`.

    def _step(self, weight, start):
        def step(weight, start):
            top = self.tops(weight, start)
            start = jax.vmap(next_start)(top, start)
            return self.measured(weight, warm(1), start)

        return automatically_sharded(step, weight, start)

    def tops(self, weight: Array, starts: Array) -> Top:
        """The largest singular values of the matrices, where they are not well below
        the bound, and their vectors."""
        matrices = lax.stop_gradient(widen(self._matrices(weight)))
        bound = bound_value(self.cap, wide_dtype(weight.dtype))
        return settled_blocks(bound, matrices, starts)


def spectral_norm(
    weight: Inexact[Array, "..."],
    *,
    matrix: RowAxes = "unit",
    blocks: int = 1,
    method: Estimator | None = None,
) -> Float[Array, ""]:
    r"""The largest singular value $\sigma_1$ of a weight as a matrix.

    Differentiable: the gradient is $u_1 v_1^H$. At a zero weight it is zero.

    **Arguments:**

    - `weight`: an array of rank 2 or more, floating or complex.
    - `matrix`, `blocks`, `method`: as in [`eqxreg.SpectralNorm`][]. Of several blocks
        it is the largest. (Keyword only arguments.)

    **Returns:**

    A real scalar of the weight's precision, to a relative error of 1e-3 at most and far
    less as a rule.

    **Raises:**

    - `TypeError`: if the weight is not floating or complex.
    - `ValueError`: if its rank is below 2, or `matrix`, `blocks` or `method` is not
        valid.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> print(eqxreg.spectral_norm(jnp.array([[3.0, 0.0], [0.0, 1.0]])))
        3.0

        ```
    """
    norm = SpectralNorm(matrix=matrix, blocks=blocks, method=method)
    norm.check(weight)
    return jnp.max(norm.singular_values(weight)).astype(real_dtype(weight.dtype))
