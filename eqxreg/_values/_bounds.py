"""Bounds: what they may be given as, how they are checked, stored and read.

A bound is a number, which is compiled in, an array, which is a constant of the tree, or
a schedule, which `project` evaluates.
"""

import dataclasses
import decimal
import fractions
import math
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int

from .._linalg import holds
from ._hidden import Constant, value_of
from ._rates import as_float


Shaped: TypeAlias = Array | jax.ShapeDtypeStruct
"""A weight, or as much of it as can be known before there is one."""


_Map = TypeVar("_Map")


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
    if holds(dtype, bound.dtype):
        return bound.astype(dtype)
    near = bound.astype(dtype)
    wide = bound.dtype if holds(bound.dtype, dtype) else jnp.dtype(jnp.float32)
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


def has_schedule(tree: Any) -> bool:
    """Whether a bound somewhere in `tree` is a schedule."""
    nodes = jax.tree.leaves(tree, is_leaf=is_schedule)
    return any(map(is_schedule, nodes))


def is_schedule(node: Any) -> bool:
    return isinstance(node, Schedule)


def _is_floating(value: Array | np.ndarray) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating)


def _requirement(minimum: float | int, strict: bool, finite: bool) -> str:
    if not math.isfinite(minimum):
        return "finite" if finite else "a number"
    if minimum == 0:
        return "positive and finite" if strict else "non-negative and finite"
    return f"finite and {'more than' if strict else 'at least'} {minimum}"
