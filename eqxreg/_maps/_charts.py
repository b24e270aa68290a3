r"""Smooth charts of the orthogonal matrices around a base point: Cayley, exponential.

A raw weight is a move away from the base. What the two share is in `_Chart`; what they
differ in is how they move.
"""

import abc
import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from .._linalg import (
    adjoint,
    anywhere,
    as_tall,
    cholesky,
    exponential,
    eye_like,
    gram_of,
    is_half,
    matmul,
    over,
    over_triangle,
    polished,
    tolerance,
    upper_triangle,
    widen,
    with_derivative_of,
)
from .._values import Constant, value_of
from ._checks import check_values
from ._matrix import (
    MatrixMap,
    RowAxes,
    Rows,
    automatically_sharded,
    check_blocks,
    check_matrix,
    from_matrices,
    to_matrices,
)
from ._orthogonal import Orthogonal


class _Chart(MatrixMap):
    """What `Cayley` and `MatrixExp` share: a base point, which is never trained, and
    raw weights that are moves away from it."""

    matrix: Rows = eqx.field(static=True)
    blocks: int = eqx.field(static=True)
    base: Constant | None

    def __init__(
        self,
        matrix: RowAxes,
        blocks: int,
        base: Inexact[Array, "..."] | Constant | None,
    ):
        self.matrix = check_matrix(matrix)
        self.blocks = check_blocks(blocks)
        self.base = None if base is None else Constant.of(value_of(base))

    @abc.abstractmethod
    def _move(self, base: Array, skew: Array, across: Array | None) -> Array:
        """From a tall `base`, along `base @ skew + across`; there is nothing across in
        a square one."""

    @abc.abstractmethod
    def _undo(self, base: Array, tall: Array) -> Array:
        """The raw matrices that are sent to `tall`, if there are any."""

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        self.check(raw)

        def moved(raw: Array) -> Array:
            base = self._base_like(raw)
            moved = as_tall(self._moved, base, self._wide(raw))
            return from_matrices(moved, raw.shape, self.matrix).astype(raw.dtype)

        return automatically_sharded(moved, raw)

    def bind(
        self, weight: Inexact[Array, "*shape"]
    ) -> tuple["_Chart", Inexact[Array, "*shape"]]:
        """**Arguments:**

        - `weight`: any weight.

        **Returns:**

        The map with the nearest orthogonal weight for its base, and the raw weight
        zero.
        """
        nearest = Orthogonal(matrix=self.matrix, blocks=self.blocks)(weight)
        bound = dataclasses.replace(self, base=nearest)
        return bound, jnp.zeros_like(weight)

    def inverse(self, weight: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        """**Arguments:**

        - `weight`: an orthogonal weight, not too far from the base.

        **Returns:**

        The raw weight that this map sends to `weight`.

        **Raises:**

        - `ValueError`: if there is none. For a traced weight, at run time, by
            `eqx.error_if`. Wrapping a layer never raises it, for the wrapper takes its
            weight as the base.
        """
        self.check(weight)
        if weight.size == 0:
            return weight
        base, matrices = self._base_like(weight), self._wide(weight)
        raw = as_tall(self._undo, base, matrices)
        result = as_tall(self._moved, base, raw)
        error = jnp.max(jnp.abs(result - matrices))
        tol = 1e-3 if not is_half(weight.dtype) else 4 * tolerance(weight.dtype)
        raw = check_values(
            raw,
            error <= tol,
            f"`{type(self).__name__}` needs an orthogonal weight that is not opposite "
            "to its base, and this one is not. Wrap the layer, or call `bind(weight)`: "
            "both take the nearest orthogonal weight as the base.",
        )
        return from_matrices(raw, weight.shape, self.matrix).astype(weight.dtype)

    def _moved(self, base: Array, raw: Array) -> Array:
        inner = matmul(adjoint(base), raw)
        skew = (inner - adjoint(inner)) / 2
        is_square = base.shape[-2] == base.shape[-1]
        across = None if is_square else raw - matmul(base, inner)
        return _repaired(self._move(base, skew, across))

    def _wide(self, weight: Array) -> Array:
        return widen(to_matrices(weight, self.matrix, self.blocks))

    def _base_like(self, weight: Array) -> Array:
        if self.base is not None:
            return lax.stop_gradient(self._wide(value_of(self.base)))
        like = jax.eval_shape(self._wide, weight)
        eye = jnp.eye(*like.shape[1:], dtype=like.dtype)
        return jnp.broadcast_to(eye, like.shape)


class Cayley(_Chart):
    r"""The matrices with orthonormal columns (rows, if they are wide), by the Cayley
    transform around a base point $B$. For a raw weight $V$, with
    $S = \mathrm{skew}(B^H V)$ and $K = V - B B^H V$,

    $$W = \left(B (I - A) + K\right) (I + A)^{-1}, \qquad
    A = \tfrac14 K^H K - \tfrac12 S.$$

    Zero stands for the base, and there the derivative is the projection onto the
    tangent space: $W \approx B + B S + K$. One linear system of the size of the smaller
    side. A wrapper takes the weight of the layer as the base or, if that is not
    orthogonal, the nearest weight that is; so it keeps weights of either determinant.

    !!! example

        ```python
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> linear = eqx.nn.Linear(5, 3, key=jax.random.key(0))
        >>> linear = eqxreg.Constraint(linear, "weight", eqxreg.Cayley())
        >>> weight = eqxreg.bake(linear).weight
        >>> bool(jnp.allclose(weight @ weight.T, jnp.eye(3), atol=1e-6))
        True

        ```

    ??? cite

        [Orthogonalizing Convolutional Layers with the Cayley
        Transform](https://arxiv.org/abs/2104.07167), Trockman and Kolter. The base is
        the dynamic trivialization of [Trivializations for Gradient-Based Optimization
        on Manifolds](https://arxiv.org/abs/1909.09501), Lezcano-Casado.
    """

    def __init__(
        self,
        *,
        matrix: RowAxes = "unit",
        blocks: int = 1,
        base: Inexact[Array, "..."] | Constant | None = None,
    ):
        """**Arguments:**

        - `matrix`, `blocks`: as in [`eqxreg.SpectralNorm`][]. (Keyword only arguments.)
        - `base`: the orthogonal weight that the raw weight zero stands for. Defaults to
            the identity, padded with zeros. Wrappers set it. (Keyword only argument.)

        **Raises:**

        - `ValueError`: if `matrix` or `blocks` is not valid or, when called, if the
            weight's rank is below 2 or `blocks` does not divide its rows.
        """
        super().__init__(matrix, blocks, base)

    def _move(self, base: Array, skew: Array, across: Array | None) -> Array:
        inner = -skew / 2
        if across is not None:
            inner = inner + gram_of(across) / 4
        eye = jnp.eye(inner.shape[-1], dtype=inner.dtype)[None]
        above = matmul(base, eye - inner)
        above = above if across is None else above + across
        return over(above, eye + inner)

    def _undo(self, base: Array, tall: Array) -> Array:
        inner = matmul(adjoint(base), tall)
        eye = jnp.eye(inner.shape[-1], dtype=inner.dtype)[None]
        a = over(eye - inner, eye + inner)
        across = matmul(tall - matmul(base, inner), eye + a)
        skew = gram_of(across) / 2 - 2 * a
        return matmul(base, (skew - adjoint(skew)) / 2) + across


class MatrixExp(_Chart):
    r"""The matrices with orthonormal columns (rows, if they are wide), by the
    exponential around a base point $B$. For a raw weight $V$, with
    $S = \mathrm{skew}(B^H V)$ and $K = V - B B^H V$,

    $$W = e^{B S B^H + K B^H - B K^H} B,$$

    which for a square base is $B e^S$. All else is as in [`eqxreg.Cayley`][]; the
    exponential is about twice as expensive, and reaches every square orthogonal matrix
    of the determinant of the base.

    A relative rounding error $\varepsilon$ of the raw weight is an error of
    $\varepsilon \lVert V \rVert$ here, but the result is orthogonal to rounding for raw
    weights of norm up to 1e5. Beyond about 1e6 it is NaN.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> raw = jnp.array([[0.0, -jnp.pi / 3], [jnp.pi / 3, 0.0]])
        >>> with jnp.printoptions(precision=3):
        ...     print(eqxreg.MatrixExp()(raw))
        [[ 0.5   -0.866]
         [ 0.866  0.5  ]]

        ```

    ??? cite

        [Cheap Orthogonal Constraints in Neural Networks: A Simple Parametrization of
        the Orthogonal and Unitary Group](https://arxiv.org/abs/1901.08428),
        Lezcano-Casado and Martínez-Rubio.
    """

    def __init__(
        self,
        *,
        matrix: RowAxes = "unit",
        blocks: int = 1,
        base: Inexact[Array, "..."] | Constant | None = None,
    ):
        """**Arguments:**

        - `matrix`, `blocks`, `base`: as in [`eqxreg.Cayley`][]. (Keyword only
            arguments.)

        **Raises:**

        - As [`eqxreg.Cayley`][] does.
        """
        super().__init__(matrix, blocks, base)

    def _move(self, base: Array, skew: Array, across: Array | None) -> Array:
        if across is None:
            power, far = exponential(skew)
            moved = matmul(base, power)
        else:
            # The exponent acts within the span of `base` and `across`, and there as a
            # matrix of twice the size of the smaller side.
            frame = _frame(across)
            scaled = over_triangle(across, frame)
            above = jnp.concatenate([skew, -matmul(adjoint(across), scaled)], axis=-1)
            below = jnp.concatenate([frame, jnp.zeros_like(skew)], axis=-1)
            power, far = exponential(jnp.concatenate([above, below], axis=-2))
            span = jnp.concatenate([base, scaled], axis=-1)
            moved = matmul(span, power[..., : skew.shape[-1]])
        # Many squarings leave more than rounding: one polish here, one by the caller.
        return lax.cond(far, _repaired, lambda moved: moved, moved)

    def _undo(self, base: Array, tall: Array) -> Array:
        is_square = base.shape[-2] == base.shape[-1]

        def step(_, raw):
            now = self._moved(base, raw)
            if is_square:
                # Of the third order: all these matrices are functions of one.
                left = matmul(adjoint(now), tall)
                return raw + matmul(base, (left - adjoint(left)) / 2)
            change = tall - now
            inner = matmul(adjoint(base), change)
            return raw + change - matmul(base, (inner + adjoint(inner)) / 2)

        return lax.fori_loop(0, 50 if is_square else 500, step, jnp.zeros_like(tall))


def _repaired(tall: Array) -> Array:
    """Polished, and differentiated as `tall` itself, which is orthogonal but for
    rounding wherever it is computed: so polishing is the identity, in all orders."""
    return with_derivative_of(polished(tall), tall)


def _frame(across: Array) -> Array:
    r"""A triangular $T$ with $T^H T = K^H K + I$, roughly. By $K T^{-1}$ in the place
    of $K$, the exponent is skew but for what is small. The result is the same for every
    $T$, and so are derivatives: it is a constant."""
    across = lax.stop_gradient(across)
    gram = gram_of(across)
    eye = eye_like(gram)

    def near(across):
        return adjoint(cholesky(gram + eye))

    # Beside large singular values of K, what is small is gone from the sum.
    def far(across):
        return upper_triangle(jnp.concatenate([across, eye], axis=-2))

    size = jnp.max(jnp.trace(gram.real, axis1=-2, axis2=-1), initial=0)
    is_far = size > 0.01 / jnp.finfo(size.dtype).eps
    return lax.cond(anywhere(is_far), far, near, across)
