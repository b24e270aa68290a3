"""The two bases, `Parametrization` and `Projection`.

A map is a module that holds hyperparameters only. What weights have to be is in
`_checks.py`, and what maps have to be in `_kept.py`.
"""

import abc
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Inexact, Int, PyTree

from .._linalg import all_finite, frobenius_norm, real_dtype, tolerance, widen
from .._values import Shaped, has_schedule, is_schedule
from ._checks import check_dtype, check_kept
from ._factored import OnlyMultiplied


_Map = TypeVar("_Map", bound="Parametrization")


class Parametrization(eqx.Module):
    """A pure map from a raw weight to the weight that a layer computes with.

    It holds hyperparameters only. `p(raw)` has the shape and dtype of `raw`, and
    `p(p.inverse(weight))` is `weight`, so that wrapping a layer whose weight is
    feasible does not change what it computes.

    To write your own, subclass this (or [`eqxreg.Projection`][], if applying the map
    twice is applying it once) and define `__call__` and `inverse`.

    In a wrapper, the arrays that a map holds are constants: no gradient reaches them,
    and no optimiser moves them. A map that has something to train names those of its
    fields in `trained`.

    !!! example

        ```python
        class Cubed(eqxreg.Parametrization):
            def __call__(self, raw):
                return raw**3

            def inverse(self, weight):
                return jnp.cbrt(weight)


        layer = eqxreg.Constraint(layer, "weight", Cubed())
        ```
    """

    trained: ClassVar[tuple[str, ...]] = ()
    """The names of the fields whose arrays are trained; all others are constants."""

    _degree: ClassVar[int | None] = None
    """The degree in which this is homogeneous: 0 if positive multiples of a weight have
    the same image, 1 if they have the same multiples of it, `None` if neither."""

    @abc.abstractmethod
    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        """**Arguments:**

        - `raw`: an array, floating or complex.

        **Returns:**

        The weight, of the same shape and dtype.
        """

    @abc.abstractmethod
    def inverse(self, weight: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        """**Arguments:**

        - `weight`: a feasible weight.

        **Returns:**

        A raw weight that this map sends to `weight`.
        """

    def bind(
        self, weight: Inexact[Array, "*shape"]
    ) -> tuple["Parametrization", Inexact[Array, "*shape"]]:
        """What a wrapper calls: a map for this weight, and the raw weight to store.

        **Arguments:**

        - `weight`: the weight of the layer that is being wrapped.

        **Returns:**

        `(self, self.inverse(weight))`, unless the map needs a base point.
        """
        return self, self.inverse(weight)

    def check(self, weight: Shaped) -> None:
        """Raises if this map cannot be applied to a weight of this shape and dtype.
        Wrappers call it when they are built.

        **Arguments:**

        - `weight`: an array, or anything with a shape and a dtype.

        **Raises:**

        - `TypeError`: if the weight is not floating, or complex where that has no
            meaning.
        - `ValueError`: if its rank is too low.
        """
        check_dtype(weight)

    def _factored(self, raw: Inexact[Array, "..."]) -> OnlyMultiplied | None:
        """`self(raw)` as multiples of the rows of `raw`, if it is that."""
        return None

    def at(self: _Map, step: Int[Array, ""]) -> _Map:
        """This map at one step of training, with schedules evaluated.

        **Arguments:**

        - `step`: the number of updates so far, a scalar integer array.

        **Returns:**

        The map, with a scalar array for each bound that was a schedule.
        """
        if not has_schedule(self):
            return self
        inner = lambda node: isinstance(node, Parametrization) and node is not self

        def evaluated(node: Any) -> Any:
            if is_schedule(node):
                return node(step)
            return node.at(step) if inner(node) else node

        is_leaf = lambda node: is_schedule(node) or inner(node)
        return jax.tree.map(evaluated, self, is_leaf=is_leaf)._in_order()

    def _in_order(self: _Map) -> _Map:
        """This map, after checking that its bounds are in order, now that schedules
        are evaluated."""
        return self


class Projection(Parametrization):
    """A [`eqxreg.Parametrization`][] that is idempotent and leaves feasible weights
    alone. Its inverse is the identity, and it may be enforced after the update too.
    """

    def inverse(self, weight: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        """**Arguments:**

        - `weight`: a feasible weight.

        **Returns:**

        `weight`, which is its own raw weight.
        """
        return weight

    def distance(self, weight: Inexact[Array, "..."]) -> Float[Array, ""]:
        r"""The Frobenius distance $\lVert W - p(W) \rVert$ to the set.

        **Arguments:**

        - `weight`: an array, floating or complex.

        **Returns:**

        A real scalar of the weight's precision. It is differentiable; on the set it is
        zero, and so is its gradient.
        """
        return self._wide_distance(weight).astype(real_dtype(weight.dtype))

    def contains(
        self, weight: Inexact[Array, "..."], tol: ArrayLike | None = None
    ) -> Bool[Array, ""]:
        """Whether a weight is in the set.

        **Arguments:**

        - `weight`: an array, floating or complex.
        - `tol`: the largest distance, relative to the norm of the weight, that counts
            as none. Defaults to what rounding in the weight's dtype may cause: 8e-6 in
            float32, 0.1 % in float16, 0.8 % in bfloat16.

        **Returns:**

        A boolean scalar array, false for a weight with NaNs or infinities.
        """
        tol = tolerance(weight.dtype) if tol is None else tol
        distance = self._wide_distance(weight)
        near = distance <= tol * frobenius_norm(weight)
        return all_finite(weight) & jnp.isfinite(distance) & near

    # `project` carries these from one projection to the next, for maps that find their
    # result sooner from the last one.

    def _start(self, weight: Inexact[Array, "..."]) -> PyTree:
        """What the first projection of this weight starts from."""
        return ()

    def _step(
        self, weight: Inexact[Array, "*shape"], start: PyTree
    ) -> tuple[Inexact[Array, "*shape"], PyTree]:
        """The projection of `weight`, and what the next one starts from."""
        return self(weight), start

    def _wide_distance(self, weight: Inexact[Array, "..."]) -> Float[Array, ""]:
        nearest = check_kept(self, weight, self(weight))
        return frobenius_norm(widen(weight) - widen(nearest))

    def _standing(
        self, weight: Inexact[Array, "..."]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The distance and the active share. A map that finds them together, and has no
        need of the nearest point, says so here; of it there is no derivative."""
        return self._wide_distance(weight), self._active(weight)

    def _largest(self, weight: Inexact[Array, "..."]) -> Float[Array, ""] | None:
        """The largest of the norms that this bounds, of a weight as it is; `None` if it
        bounds none."""
        return None

    def _active(self, weight: Inexact[Array, "..."]) -> Float[Array, ""]:
        """The share of the units of `weight` that this map moves, or would move if they
        were longer or shorter by what rounding may do. Of a vector or a scalar, each
        entry is a unit."""
        slack = boundary_slack(weight.dtype)
        wide = widen(weight)
        near = jnp.stack([wide * (1 + slack), wide * (1 - slack)]).astype(weight.dtype)
        moved = jax.vmap(self)(near) != near
        return share(jnp.any(moved, axis=(0, *range(2, near.ndim))), wide)


def boundary_slack(dtype) -> float:
    """How far from the boundary, relatively, a weight of this dtype may be and count as
    on it: it may be short of it by the tolerance."""
    return 2 * tolerance(dtype)


def share(flags: Bool[Array, "..."], like: Inexact[Array, "..."]) -> Float[Array, ""]:
    """The share of `flags` that are true, in the precision of `like`; of none, zero."""
    total = jnp.asarray(max(flags.size, 1), real_dtype(like.dtype))
    # XLA would multiply by the reciprocal, and all of them would not be exactly 1.
    total = jax.lax.optimization_barrier(total)
    return jnp.sum(flags, dtype=total.dtype) / total


def factored(p: Parametrization, raw: Inexact[Array, "..."]) -> OnlyMultiplied | None:
    """`p(raw)` as multiples of the rows of `raw`, if it is that. A subclass that has a
    `__call__` of its own may be anything."""
    cls = next(c for c in type(p).__mro__ if "_factored" in vars(c))
    return p._factored(raw) if type(p).__call__ is cls.__call__ else None


def check_projection(projection: Any) -> None:
    """Raises unless this is a map that may be enforced after the update."""
    if not isinstance(projection, Projection):
        kind = type(projection).__name__
        raise TypeError(
            "`projection` must be an `eqxreg.Projection`, whose raw weights are "
            f"weights themselves, got {projection!r}. A {kind} works in the forward "
            "pass, by `eqxreg.Constraint` or `eqxreg.constrain`."
        )


def composed_degree(degrees: Iterable[int | None]) -> int | None:
    """The degree of maps one after the other. Once the size is lost it cannot matter
    any more, whatever follows."""
    for degree in degrees:
        if degree != 1:
            return degree
    return 1
