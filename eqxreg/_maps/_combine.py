"""Maps made of maps."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Inexact, PyTree

from .._linalg import with_derivative_of
from .._values import Shaped
from ._base import Parametrization, Projection, composed_degree
from ._checks import check_kept
from ._kept import bound_to


class StraightThrough(Projection):
    """A projection whose backward pass is the identity.

    The layer computes with the projected weight; gradients reach the raw weight as if
    nothing had been done. So no weight is dead, not even behind
    [`eqxreg.NonNegative`][], at the price that raw weights may wander off.

    !!! example

        ```python
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> p = eqxreg.StraightThrough(eqxreg.NonNegative())
        >>> print(jax.grad(lambda w: p(w).sum())(jnp.array([-1.0, 2.0])))
        [1. 1.]

        ```

    ??? cite

        [Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
        Computation](https://arxiv.org/abs/1308.3432), Bengio, Léonard and Courville.
    """

    projection: Projection

    def __init__(self, projection: Projection):
        """**Arguments:**

        - `projection`: the map of the forward pass.

        **Raises:**

        - `TypeError`: if it is not a [`eqxreg.Projection`][].
        """
        if not isinstance(projection, Projection):
            raise TypeError(
                "`projection` must be an `eqxreg.Projection`, whose raw weights are "
                f"weights themselves, got {projection!r}."
            )
        self.projection = projection

    @property
    def _degree(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.projection._degree

    def check(self, weight: Shaped) -> None:
        self.projection.check(weight)

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        return with_derivative_of(self.projection(raw), raw)

    def bind(
        self, weight: Inexact[Array, "*shape"]
    ) -> tuple["StraightThrough", Inexact[Array, "*shape"]]:
        p, raw = self.projection.bind(weight)
        return StraightThrough(p), raw  # pyright: ignore[reportArgumentType]

    def _start(self, weight: Inexact[Array, "..."]) -> PyTree:
        return self.projection._start(weight)

    def _step(
        self, weight: Inexact[Array, "*shape"], start: PyTree
    ) -> tuple[Inexact[Array, "*shape"], PyTree]:
        return self.projection._step(weight, start)

    def _wide_distance(self, weight: Inexact[Array, "..."]) -> Float[Array, ""]:
        return self.projection._wide_distance(weight)

    def _largest(self, weight: Inexact[Array, "..."]) -> Float[Array, ""] | None:
        return self.projection._largest(weight)

    def _active(self, weight: Inexact[Array, "..."]) -> Float[Array, ""]:
        return self.projection._active(weight)

    def contains(
        self, weight: Inexact[Array, "..."], tol: ArrayLike | None = None
    ) -> Bool[Array, ""]:
        return self.projection.contains(weight, tol)


class Chain(Parametrization):
    r"""Several maps, one after the other: $w = p_n(\cdots p_2(p_1(v)))$.

    Only the last promise is sure: a later map may leave the set of an earlier one.
    Scaling after clipping is safe (`Chain(NonNegative(), MaxNorm(1.0))` keeps both
    promises); clipping a matrix of norm one to non-negative entries is not a unit norm
    any more.

    A chain of projections is an [`eqxreg.Projection`][] itself, and may be enforced
    after the update.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> p = eqxreg.Chain(eqxreg.NonNegative(), eqxreg.MaxNorm(1.0))
        >>> with jnp.printoptions(precision=3):
        ...     print(p(jnp.array([-5.0, 3.0, 4.0])))
        [0.  0.6 0.8]

        ```
    """

    maps: tuple[Parametrization, ...]

    def __new__(cls, *maps: Parametrization):
        # Whether a chain is a projection depends on its parts, and `isinstance` is how
        # everybody asks. No parts are given when copying, and then `cls` is right.
        if cls is Chain and maps and all(isinstance(p, Projection) for p in maps):
            cls = _ProjectionChain
        return super().__new__(cls)  # pyright: ignore[reportArgumentType]

    def __init__(self, *maps: Parametrization):
        """**Arguments:**

        - `*maps`: the maps; the first is applied first.

        **Raises:**

        - `ValueError`: if there are none.
        - `TypeError`: if one is not a [`eqxreg.Parametrization`][].
        """
        if len(maps) == 0:
            raise ValueError("`Chain` needs at least one map.")
        for p in maps:
            if not isinstance(p, Parametrization):
                raise TypeError(
                    f"`Chain` is made of `eqxreg.Parametrization`s, got {p!r}."
                )
        self.maps = maps

    @property
    def _degree(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return composed_degree(p._degree for p in self.maps)

    def check(self, weight: Shaped) -> None:
        for p in self.maps:
            p.check(weight)

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        for p in self.maps:
            raw = check_kept(p, raw, p(raw))
        return raw

    def inverse(self, weight: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        """**Arguments:**

        - `weight`: a weight in the sets of all the maps.

        **Returns:**

        The raw weight, by the inverses of the maps, the last first.
        """
        for p in reversed(self.maps):
            weight = check_kept(p, weight, p.inverse(weight), ".inverse")
        return weight

    def bind(
        self, weight: Inexact[Array, "*shape"]
    ) -> tuple["Chain", Inexact[Array, "*shape"]]:
        bound = []
        for p in reversed(self.maps):
            p, weight = bound_to(p, weight)
            bound.append(p)
        return Chain(*reversed(bound)), weight


class _ProjectionChain(  # pyright: ignore[reportIncompatibleVariableOverride]
    Chain, Projection
):
    @property
    def _projections(self) -> tuple[Projection, ...]:
        return self.maps  # pyright: ignore[reportReturnType]

    def _start(self, weight: Inexact[Array, "..."]) -> PyTree:
        return tuple(p._start(weight) for p in self._projections)

    def _step(
        self, weight: Inexact[Array, "*shape"], start: PyTree
    ) -> tuple[Inexact[Array, "*shape"], PyTree]:
        following = []
        for p, own in zip(self._projections, start, strict=True):
            weight, own = p._step(weight, own)
            following.append(own)
        return weight, tuple(following)

    def _wide_distance(self, weight: Inexact[Array, "..."]) -> Float[Array, ""]:
        # A distance has a gradient of its own, though a map may be straight through.
        true = [
            p.projection if isinstance(p, StraightThrough) else p for p in self.maps
        ]
        chain = _ProjectionChain(*true)  # pyright: ignore[reportArgumentType]
        return Projection._wide_distance(chain, weight)

    def _largest(self, weight: Inexact[Array, "..."]) -> Float[Array, ""] | None:
        """That of the last map, whose promise holds."""
        return self._projections[-1]._largest(weight)

    def _active(self, weight: Inexact[Array, "..."]) -> Float[Array, ""]:
        """The largest of the shares of the maps, each at what it is given."""
        shares = []
        for p in self._projections:
            shares.append(p._active(weight))
            weight = p(weight)
        return jnp.max(jnp.stack(shares))

    def contains(
        self, weight: Inexact[Array, "..."], tol: ArrayLike | None = None
    ) -> Bool[Array, ""]:
        """Whether a weight is in the sets of all the maps."""
        parts = [p.contains(weight, tol) for p in self._projections]
        return jnp.all(jnp.stack(parts))


# It prints as what the user wrote; `__qualname__` is where pickles find it.
_ProjectionChain.__name__ = "Chain"
