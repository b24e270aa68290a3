"""The two bases, `Parametrization` and `Projection`, and what a bound may be.

A map is a module that holds hyperparameters only. What it shares with the others is
here: how bounds are checked, stored and read, and how a distance to a set is measured.
"""

import abc
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Inexact, Int, PyTree

from .._norms import all_finite, frobenius_norm, real_dtype, tolerance, widen
from ._factored import Factored


@jax.tree_util.register_static
class Number(float):
    """A Python number that is no leaf of the tree: it is compiled in, and neither
    `jax.grad` nor `lax.scan` over stacked layers meets it."""


@jax.tree_util.register_static
class Schedule:
    """A bound as a function of the step; `project` evaluates it."""

    def __init__(self, fn: Callable[[Any], Any]):
        self.fn = fn

    def __call__(self, step: Int[Array, ""]) -> Array:
        return jnp.asarray(self.fn(step))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.fn == other.fn

    def __hash__(self) -> int:
        return hash(self.fn)

    def __repr__(self) -> str:
        return f"<schedule {getattr(self.fn, '__name__', self.fn)}>"


Bound: TypeAlias = float | int | np.number | np.ndarray | Array | Callable
"""What a bound may be given as: a Python number (compiled in), a JAX scalar array
(traced) or, for use in `project`, an Optax schedule."""


StoredBound: TypeAlias = Number | Array | Schedule
"""The forms in which bounds are stored."""

_Map = TypeVar("_Map", bound="Parametrization")

Shaped: TypeAlias = Array | jax.ShapeDtypeStruct
"""A weight, or as much of it as can be known before there is one."""


def check_bound(
    value: Any, name: str, *, minimum: float | int = -math.inf, strict: bool = False
) -> StoredBound:
    """The form in which a bound is stored, after checking what can be checked.

    **Arguments:**

    - `value`: what the user gave.
    - `name`: the argument's name, for the error.
    - `minimum`: the smallest value allowed. If it is finite, then so is the bound.
    - `strict`: whether `minimum` itself is not allowed.
    """
    if callable(value) and not isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return value if isinstance(value, Schedule) else Schedule(value)
    if isinstance(value, bool) or not isinstance(
        value, (int, float, np.number, np.ndarray, jax.Array)
    ):
        raise TypeError(
            f"`{name}` must be a number, a JAX scalar array or an Optax schedule, got "
            f"{value!r}."
        )
    if isinstance(value, (np.ndarray, jax.Array)) and value.ndim != 0:
        raise ValueError(
            f"`{name}` must be a scalar, got an array of shape {value.shape}."
        )
    # NumPy's: a map may be built before the processes of a cluster meet, and nothing in
    # JAX may have run then.
    if np.iscomplexobj(value):
        raise TypeError(f"`{name}` must be real, got {value!r}.")
    need = _requirement(minimum, strict)
    if isinstance(value, jax.Array):
        # A weak type would make a bound that is replaced later a new trace.
        dtype = value.dtype if _is_floating(value) else float
        value = jnp.asarray(value, dtype=dtype)
        if isinstance(value, Tracer):
            fine = (value > minimum) if strict else (value >= minimum)
            return eqx.error_if(value, ~fine, f"`{name}` must be {need}.")
    number = float(value)
    below = number <= minimum if strict else number < minimum
    endless = math.isfinite(minimum) and math.isinf(number)
    if math.isnan(number) or (math.isfinite(minimum) and below) or endless:
        raise ValueError(f"`{name}` must be {need}, got {number}.")
    return value if isinstance(value, jax.Array) else Number(number)


def check_order(lower: Any, upper: Any, names: tuple[str, str], *, strict: bool):
    """Raises if two bounds, as far as they are known, are in the wrong order."""
    if any(isinstance(bound, Schedule | Tracer) for bound in (lower, upper)):
        return
    if float(lower) > float(upper) or (strict and float(lower) == float(upper)):
        relation = "less than" if strict else "at most"
        raise ValueError(
            f"`{names[0]}` must be {relation} `{names[1]}`, got "
            f"`{names[0]}={float(lower)}` and `{names[1]}={float(upper)}`."
        )


def bound_value(
    bound: float | int | Array | Schedule, dtype, *, toward: float = -math.inf
) -> Float[Array, "..."]:
    """A bound as an array of `dtype`, with no gradient: a scalar, unless it is relative
    to the norms of several units. A Python number that
    `dtype` cannot hold is rounded towards `toward`: to the inside of the set."""
    if isinstance(bound, Schedule):
        raise ValueError(
            "A bound that is a schedule needs a step. Use it in `eqxreg.project`, "
            "which counts steps, or give a number or a JAX scalar array."
        )
    if isinstance(bound, jax.Array):
        return jax.lax.stop_gradient(bound.astype(dtype))
    exact = np.float64(bound)
    with np.errstate(over="ignore"):
        rounded = np.asarray(exact, dtype=dtype)
    beyond = rounded > exact if toward < 0 else rounded < exact
    if beyond:
        rounded = np.nextafter(rounded, np.asarray(toward, dtype=dtype))
    return jnp.asarray(rounded, dtype=dtype)


def has_schedule(tree: Any) -> bool:
    """Whether a bound somewhere in `tree` is a schedule."""
    nodes = jax.tree.leaves(tree, is_leaf=_is_schedule)
    return any(map(_is_schedule, nodes))


def check_dtype(weight: Any, *, complex_for: str | None = None) -> None:
    """Raises unless `weight` is a floating array, or a complex one.

    **Arguments:**

    - `weight`: what a map was given.
    - `complex_for`: the name of a map that has no meaning for complex weights.
    """
    dtype = getattr(weight, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        kind = type(weight).__name__ if dtype is None else f"an array of {dtype}"
        raise TypeError(f"A weight must be a floating or complex array, got {kind}.")
    if complex_for is not None and jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"`{complex_for}` has no meaning for a complex weight: complex numbers "
            "have no order. Constrain the real and the imaginary part separately."
        )


def check_values(
    weight: Inexact[Array, "*shape"], fine: Bool[Array, "..."], message: str
) -> Inexact[Array, "*shape"]:
    """`weight`, after checking that all of it is `fine`: now, or when it is known."""
    if isinstance(fine, Tracer):
        return eqx.error_if(weight, ~jnp.all(fine), message)
    if not np.all(np.asarray(fine)):
        raise ValueError(message)
    return weight


class Parametrization(eqx.Module):
    """A pure map from a raw weight to the weight that a layer computes with.

    It holds hyperparameters only. `p(raw)` has the shape and dtype of `raw`, and
    `p(p.inverse(weight))` is `weight`, so that wrapping a layer whose weight is
    feasible does not change what it computes.

    To write your own, subclass this (or [`eqxreg.Projection`][], if applying the map
    twice is applying it once) and define `__call__` and `inverse`.

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

    def _factored(self, raw: Inexact[Array, "..."]) -> Factored | None:
        """`self(raw)` as multiples of the rows of `raw`, if it is that."""
        return None

    def at(self: _Map, step: Int[Array, ""]) -> _Map:
        """This map at one step of training, with schedules evaluated.

        **Arguments:**

        - `step`: the number of updates so far, a scalar integer array.

        **Returns:**

        The map, with a scalar array for each bound that was a schedule.
        """
        return jax.tree.map(
            lambda node: node(step) if _is_schedule(node) else node,
            self,
            is_leaf=_is_schedule,
        )


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
        return frobenius_norm(widen(weight) - widen(self(weight)))

    def _active(self, weight: Inexact[Array, "..."]) -> Float[Array, ""]:
        """The share of the units of `weight` that this map moves, or would move if they
        were longer or shorter by what rounding may do. Of a vector or a scalar, each
        entry is a unit."""
        # A weight on the boundary may be short of it by the tolerance.
        slack = 2 * tolerance(weight.dtype)
        wide = widen(weight)
        near = jnp.stack([wide * (1 + slack), wide * (1 - slack)]).astype(weight.dtype)
        moved = jax.vmap(self)(near) != near
        return share(jnp.any(moved, axis=(0, *range(2, near.ndim))), wide)


def share(flags: Bool[Array, "..."], like: Inexact[Array, "..."]) -> Float[Array, ""]:
    """The share of `flags` that are true, in the precision of `like`; of none, zero."""
    total = jnp.asarray(max(flags.size, 1), real_dtype(like.dtype))
    # XLA would multiply by the reciprocal, and all of them would not be exactly 1.
    total = jax.lax.optimization_barrier(total)
    return jnp.sum(flags, dtype=total.dtype) / total


def factored(p: Parametrization, raw: Inexact[Array, "..."]) -> Factored | None:
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


def _is_schedule(node: Any) -> bool:
    return isinstance(node, Schedule)


def _is_floating(value: Array) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating)


def _requirement(minimum: float | int, strict: bool) -> str:
    if not math.isfinite(minimum):
        return "a number"
    if minimum == 0:
        return "positive and finite" if strict else "non-negative and finite"
    return f"finite and {'more than' if strict else 'at least'} {minimum}"
