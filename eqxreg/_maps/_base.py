"""The two bases, `Parametrization` and `Projection`, and what a bound may be.

A map is a module that holds hyperparameters only. What it shares with the others is
here: how bounds are checked, stored and read, and how a distance to a set is measured.
"""

import abc
import dataclasses
import decimal
import fractions
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType
from jaxtyping import Array, ArrayLike, Bool, Float, Inexact, Int, PyTree

from .._bits import Constant, value_of
from .._norms import all_finite, frobenius_norm, real_dtype, tolerance, widen
from .._rates import as_float
from ._factored import Factored


@jax.tree_util.register_static
class Number(float):
    """A Python number that is no leaf of the tree: it is compiled in, and neither
    `jax.grad` nor `lax.scan` over stacked layers meets it."""


@dataclasses.dataclass(frozen=True)
class Requirement:
    """What a bound has to be: the arguments of `check_bound` but the first."""

    name: str
    minimum: float | int
    strict: bool
    several: bool
    finite: bool
    toward: float | None
    hint: str


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, repr=False)
class Schedule:
    """A bound as a function of the step; `project` evaluates it, and checks what it
    gives as it would a number."""

    fn: Callable[[Any], Any]
    requirement: Requirement | None = None

    def __call__(self, step: Int[Array, ""]) -> Array:
        now = self.fn(step)
        need = self.requirement
        if need is not None:
            now = check_bound(now, **dataclasses.asdict(need))
        if isinstance(now, Schedule):
            raise TypeError(f"{self!r} must give numbers, and gives {now!r}.")
        return jnp.asarray(value_of(now))

    def __repr__(self) -> str:
        return f"<schedule {getattr(self.fn, '__name__', self.fn)}>"


Bound: TypeAlias = float | int | np.number | np.ndarray | Array | Constant | Callable
"""What a bound may be given as: a Python number (compiled in), a JAX scalar array
(traced) or, for use in `project`, an Optax schedule. Some maps take arrays of them."""


StoredBound: TypeAlias = Number | Constant | Array | Schedule
"""The forms in which bounds are stored, and arrays, which they are at one step of
training."""

_Map = TypeVar("_Map", bound="Parametrization")

Shaped: TypeAlias = Array | jax.ShapeDtypeStruct
"""A weight, or as much of it as can be known before there is one."""


def check_bound(
    value: Any,
    name: str,
    *,
    minimum: float | int = -math.inf,
    strict: bool = False,
    several: bool = False,
    finite: bool = False,
    toward: float | None = None,
    hint: str = "",
) -> StoredBound:
    """The form in which a bound is stored, after checking what can be checked.

    **Arguments:**

    - `value`: what the user gave.
    - `name`: the argument's name, for the error.
    - `minimum`: the smallest value allowed. If it is finite, then so is the bound.
    - `strict`: whether `minimum` itself is not allowed.
    - `several`: whether an array of bounds will do.
    - `finite`: whether the bound has to be finite.
    - `toward`: where to round what no array of JAX holds, as in `bound_value`. Defaults
        to the nearest number.
    - `hint`: what to do instead, for the error.
    """
    value = value_of(value)
    if callable(value) and not isinstance(value, (jax.Array, np.ndarray, np.generic)):
        if isinstance(value, Schedule):
            return value
        need = Requirement(name, minimum, strict, several, finite, toward, hint)
        return Schedule(value, need)
    check_real(value, name, several=several)
    finite = finite or math.isfinite(minimum)
    need = _requirement(minimum, strict, finite)
    remedy = f" {hint}" if hint else ""
    if isinstance(value, jax.Array) or (
        isinstance(value, np.ndarray) and value.ndim != 0
    ):
        if isinstance(value, Tracer):
            fine = _is_fine(value, minimum, strict, finite)
            message = f"`{name}` must be {need}.{remedy}"
            value = eqx.error_if(value, jnp.any(~fine), message)
        else:
            known = np.asarray(value)
            wrong = known[~_is_fine(known, minimum, strict, finite)]
            if wrong.size > 0:
                got = wrong.flat[0]
                raise ValueError(f"`{name}` must be {need}, got {got}.{remedy}")
        # A weak type would make a bound that is replaced later a new trace.
        dtype = jnp.result_type(float)
        if _is_floating(value) and value.dtype.itemsize < dtype.itemsize:
            dtype = value.dtype
        if isinstance(value, np.ndarray):
            value = rounded(value, dtype, toward)
        return Constant.of(jnp.asarray(value, dtype=dtype))
    # Adding zero makes a negative zero a positive one, which it is equal to.
    number = as_float(value) + 0.0
    if not _is_fine(number, minimum, strict, finite):
        raise ValueError(f"`{name}` must be {need}, got {number}.{remedy}")
    return Number(number)


def check_real(value: Any, name: str, *, several: bool) -> None:
    """Raises unless this is a real number or, if there may be `several`, an array."""
    is_number = isinstance(value, (int, float, np.number, np.ndarray, jax.Array))
    if isinstance(value, bool) or not is_number:
        array = "array" if several else "scalar array"
        exact = isinstance(value, (fractions.Fraction, decimal.Decimal))
        listed = several and isinstance(value, (list, tuple))
        remedy = " Give `float(...)` of it." if exact else ""
        remedy = " Give `jnp.asarray(...)` of it." if listed else remedy
        raise TypeError(
            f"`{name}` must be a number, a JAX {array} or an Optax schedule, got "
            f"{value!r}.{remedy}"
        )
    if isinstance(value, (np.ndarray, jax.Array)) and value.ndim and not several:
        raise ValueError(
            f"`{name}` must be a scalar, got an array of shape {value.shape}."
        )
    # NumPy's: a map may be built before the processes of a cluster meet, and nothing in
    # JAX may have run then.
    if np.iscomplexobj(value):
        raise TypeError(f"`{name}` must be real, got {value!r}.")
    dtype = getattr(value, "dtype", None)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.number):
        raise TypeError(f"`{name}` must be of numbers, got an array of {dtype}.")


def _is_fine(value: Any, minimum: float | int, strict: bool, finite: bool) -> Any:
    """Whether a bound is what is required of it; of an array, each entry."""
    above = value > minimum if strict else value >= minimum
    return above & (abs(value) < math.inf) if finite else above


def check_order(
    given: tuple[Any, Any],
    stored: tuple[StoredBound, StoredBound],
    names: tuple[str, str],
    *,
    strict: bool,
) -> tuple[StoredBound, StoredBound]:
    """Two bounds as they are `stored`, after checking that they were `given` in order
    and of shapes that fit each other: now, or when they are known. Schedules are
    checked when they are evaluated."""
    if any(isinstance(bound, Schedule) for bound in stored):
        return stored
    relation = "less than" if strict else "at most"
    lower, upper = map(value_of, given)
    low_shape, high_shape = np.shape(lower), np.shape(upper)
    try:
        np.broadcast_shapes(low_shape, high_shape)
    except ValueError:
        raise ValueError(
            f"`{names[0]}` and `{names[1]}` must have shapes that broadcast to each "
            f"other, got {low_shape} and {high_shape}."
        ) from None
    if isinstance(lower, Tracer) or isinstance(upper, Tracer):
        low, high = jnp.broadcast_arrays(
            *(jnp.asarray(x).astype(jnp.result_type(float)) for x in (lower, upper))
        )
        crossed = jnp.any(low >= high if strict else low > high)
        message = f"`{names[0]}` must be {relation} `{names[1]}`."
        return eqx.error_if(stored, crossed, message)
    exact = [as_float(x) if isinstance(x, int) else x for x in (lower, upper)]
    low, high = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in exact))
    wrong = low >= high if strict else low > high
    if np.any(wrong):
        raise ValueError(
            f"`{names[0]}` must be {relation} `{names[1]}`, got "
            f"`{names[0]}={low[wrong].flat[0]}` and "
            f"`{names[1]}={high[wrong].flat[0]}`."
        )
    return stored


def in_order(p: _Map, names: tuple[str, str], *, strict: bool) -> _Map:
    """`p`, after `check_order` of two of its bounds."""
    find = lambda p: tuple(getattr(p, name) for name in names)
    both = check_order(find(p), find(p), names, strict=strict)
    return eqx.tree_at(find, p, both, is_leaf=lambda x: isinstance(x, Number))


def check_broadcasts(name: str, shape: tuple[int, ...], weight: Shaped) -> None:
    """Raises unless an array of this shape, the argument `name`, can be stretched to
    the shape of a weight."""
    # Axes of size one are stretched, and missing ones are the first.
    ones = (1,) * (weight.ndim - len(shape))
    sizes = zip(ones + shape, weight.shape, strict=False)
    if len(shape) > weight.ndim or not all(m in (1, n) for m, n in sizes):
        raise ValueError(
            f"`{name}` must have the shape of the weight, {tuple(weight.shape)}, or "
            f"one that broadcasts to it, got {shape}."
        )


def stretched(array: Array, weight: Array) -> Array:
    """`array` in the shape of a weight, laid out as it is on a mesh."""
    array = jnp.broadcast_to(array, weight.shape)
    sharding = jax.typeof(weight).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(array, sharding)
    return array


def bound_shape(bound: Any) -> tuple[int, ...]:
    """The shape of a bound, as far as it is known: a schedule may give any."""
    return () if isinstance(bound, (Number, Schedule)) else tuple(bound.shape)


def bound_value(
    bound: float | int | Array | Constant | Schedule,
    dtype,
    *,
    toward: float = -math.inf,
) -> Float[Array, "..."]:
    """A bound as an array of `dtype`, with no gradient: a scalar, unless there are
    several bounds. What `dtype` cannot hold is rounded towards `toward`: to the inside
    of the set."""
    bound = value_of(bound)
    if isinstance(bound, Schedule):
        raise ValueError(
            "A bound that is a schedule needs a step. Use it in `eqxreg.project`, "
            "which counts steps, or give a number or a JAX scalar array."
        )
    if not isinstance(bound, jax.Array):
        return jnp.asarray(rounded(np.float64(bound), dtype, toward), dtype=dtype)
    bound = jax.lax.stop_gradient(bound)
    if not _is_floating(bound):
        bound = bound.astype(jnp.float32)
    if _holds(dtype, bound.dtype):
        return bound.astype(dtype)
    near = bound.astype(dtype)
    wide = bound.dtype if _holds(bound.dtype, dtype) else jnp.dtype(jnp.float32)
    back, bound = near.astype(wide), bound.astype(wide)
    beyond = back > bound if toward < 0 else back < bound
    inside = jnp.nextafter(near, jnp.full_like(near, toward))
    return jnp.where(beyond, inside, near)


def rounded(value: np.ndarray | np.number, dtype, toward: float | None) -> np.ndarray:
    """`value` in `dtype`: the nearest number or, where it is not exact, the next one
    towards `toward`."""
    with np.errstate(over="ignore"):
        near = np.asarray(value, dtype=dtype)
    if toward is None:
        return near
    beyond = near > value if toward < 0 else near < value
    if not np.any(beyond):
        return near
    return np.where(beyond, np.nextafter(near, np.asarray(toward, near.dtype)), near)


def _holds(dtype, other) -> bool:
    """Whether a floating dtype holds all numbers of another."""
    own, other = jnp.finfo(dtype), jnp.finfo(other)
    return own.nmant >= other.nmant and own.maxexp >= other.maxexp


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


def check_kept(p: "Parametrization", given: Any, result: Any, method: str = "") -> Any:
    """`result`, after checking that it has the shape and dtype of what a map, or a
    method of it, was given."""
    name = type(p).__name__ + method
    if not (hasattr(result, "shape") and hasattr(result, "dtype")):
        raise TypeError(
            f"`{name}` returned {_kind(result)} for a weight: a map must keep shape "
            "and dtype."
        )
    before, after = ((tuple(x.shape), jnp.dtype(x.dtype)) for x in (given, result))
    if before != after:
        raise ValueError(
            f"`{name}` returned an array of shape {after[0]} and {after[1]} for one of "
            f"shape {before[0]} and {before[1]}: a map must keep shape and dtype."
        )
    return result


def bound_to(p: "Parametrization", weight: Any) -> tuple[Any, Any]:
    """`p.bind(weight)`, after checking that the raw weight is as this one."""
    bound, raw = p.bind(weight)
    return bound, check_kept(p, weight, raw, ".inverse" if bound is p else ".bind")


def check_weight(p: "Parametrization", weight: Any) -> None:
    """Raises if this map cannot be applied to such a weight, or changes its shape or
    dtype. Nothing is computed."""
    p.check(weight)
    if _is_own(p):
        return
    try:
        result = jax.eval_shape(p, weight)
    except _NEEDS_VALUES:
        # It cannot be traced, and what it does is not known before it is called.
        return
    check_kept(p, weight, result)


_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def _is_own(p: "Parametrization") -> bool:
    """Whether this map, and all that it is made of, computes as one of eqxreg does."""
    cls = next(c for c in type(p).__mro__ if "__call__" in vars(c))
    is_part = lambda x: isinstance(x, Parametrization) and x is not p
    parts = filter(is_part, jax.tree.leaves(p, is_leaf=is_part))
    return cls.__module__.startswith("eqxreg.") and all(map(_is_own, parts))


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


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
        if not has_schedule(self):
            return self
        inner = lambda node: isinstance(node, Parametrization) and node is not self

        def evaluated(node: Any) -> Any:
            if _is_schedule(node):
                return node(step)
            return node.at(step) if inner(node) else node

        is_leaf = lambda node: _is_schedule(node) or inner(node)
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


def _is_floating(value: Array | np.ndarray) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating)


def _requirement(minimum: float | int, strict: bool, finite: bool) -> str:
    if not math.isfinite(minimum):
        return "finite" if finite else "a number"
    if minimum == 0:
        return "positive and finite" if strict else "non-negative and finite"
    return f"finite and {'more than' if strict else 'at least'} {minimum}"
