"""Maps that act on each entry of a weight by itself."""

import functools as ft
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from .._linalg import widen
from .._values import (
    Bound,
    Shaped,
    StoredBound,
    bound_shape,
    bound_value,
    check_bound,
    check_broadcasts,
    check_order,
    in_order,
    stretched,
)
from ._base import Parametrization, Projection, share
from ._checks import check_dtype, check_values


def clip(
    weight: Float[Array, "*shape"],
    lower: Float[Array, "..."] | None,
    upper: Float[Array, "..."] | None,
) -> Float[Array, "*shape"]:
    """`weight` between `lower` and `upper`, scalars or of its shape. Either may be
    missing.

    NaNs and infinities stay, unlike in `jnp.clip`. The derivative is 1 inside, bounds
    included, and 0 outside.
    """
    clipped = weight
    if upper is not None:
        clipped = jnp.where(weight > upper, upper, clipped)
    if lower is not None:
        clipped = jnp.where(weight < lower, lower, clipped)
    return _keep_infinities(weight, clipped)


class NonNegative(Projection):
    r"""The weights without negative entries: $w_i \mapsto \max(w_i, 0)$.

    In the forward pass an entry that is negative gets no gradient, and never comes
    back. There, [`eqxreg.Positive`][] or
    `eqxreg.StraightThrough(eqxreg.NonNegative())` keeps weights alive; in
    [`eqxreg.project`][] nothing is lost.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> print(eqxreg.NonNegative()(jnp.array([-1.0, 0.0, 2.0])))
        [0. 0. 2.]

        ```
    """

    _degree: ClassVar[int | None] = 1

    def check(self, weight: Shaped) -> None:
        check_dtype(weight, complex_for="NonNegative")

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        self.check(raw)
        return clip(raw, jnp.zeros((), raw.dtype), None)

    def _active(self, weight: Inexact[Array, "..."]) -> Float[Array, ""]:
        return share(weight <= 0, widen(weight))


class Box(Projection):
    r"""The weights with entries between two bounds:
    $w_i \mapsto \min(\max(w_i, l_i), u_i)$.

    The bounds may be arrays, one for each entry or stretched along some axes. So
    columns keep their signs, as those of a network whose units are excitatory or
    inhibitory do (Dale's law), and weights stay in a region of trust around others:

    ```python
    signs = jnp.where(excitatory, 1.0, -1.0)  # one for each input
    Box(jnp.where(signs > 0, 0.0, -jnp.inf), jnp.where(signs > 0, jnp.inf, 0.0))
    Box(start - 0.1, start + 0.1)
    ```

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> print(eqxreg.Box(-1.0, 0.5)(jnp.array([-3.0, 0.25, 2.0])))
        [-1.    0.25  0.5 ]
        >>> signs = eqxreg.Box(jnp.array([0.0, -jnp.inf]), jnp.array([jnp.inf, 0.0]))
        >>> print(signs(jnp.array([[-1.0, -2.0], [3.0, 4.0]])))
        [[ 0. -2.]
         [ 3.  0.]]

        ```
    """

    lower: StoredBound
    upper: StoredBound

    def __init__(self, lower: Bound, upper: Bound):
        r"""**Arguments:**

        - `lower`, `upper`: the bounds $l \le u$: numbers, schedules, or arrays of the
            shape of the weight or of one that broadcasts to it. Any may be infinite. An
            array is of the weight of one layer, and holds for each in a stack.

        **Raises:**

        - `ValueError`: if a bound is NaN, `lower > upper`, or, when called, if the
            shape of a bound does not broadcast to that of the weight.
        """
        given, names = (lower, upper), ("lower", "upper")
        stored = (
            check_bound(lower, "lower", several=True, toward=math.inf),
            check_bound(upper, "upper", several=True, toward=-math.inf),
        )
        self.lower, self.upper = check_order(given, stored, names, strict=False)

    def _in_order(self) -> "Box":
        return in_order(self, ("lower", "upper"), strict=False)

    def check(self, weight: Shaped) -> None:
        _check_bounded(self, weight)

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        self.check(raw)
        return clip(raw, *self._bounds(raw))

    def _active(self, weight: Inexact[Array, "..."]) -> Float[Array, ""]:
        lower, upper = self._bounds(weight)
        return share((weight <= lower) | (weight >= upper), widen(weight))

    def _bounds(self, weight: Array) -> tuple[Array, Array]:
        lower, upper = _bounds_like(self, weight, weight.dtype)
        # Rounded towards the inside, two bounds that were equal may have crossed.
        return jnp.minimum(lower, upper), upper


class _OpenMap(NamedTuple):
    forward: Callable[[Array], Array]
    inverse: Callable[[Array], Array]


_POSITIVE = {
    # log(exp(w) - 1) without overflow for large w or cancellation for small w.
    "softplus": _OpenMap(jax.nn.softplus, lambda w: w + jnp.log(-jnp.expm1(-w))),
    "exp": _OpenMap(jnp.exp, jnp.log),
}


class Positive(Parametrization):
    r"""The positive weights, as the image of all weights:
    $w = \log(1 + e^v)$ or $w = e^v$.

    Unlike under [`eqxreg.NonNegative`][], no weight is ever dead.

    A weight that is wrapped has to be positive, and that of a fresh layer is not. To
    start inside, project first:

    ```python
    model = eqxreg.project_params(model, eqxreg.Box(1e-3, jnp.inf))
    model = eqxreg.constrain(model, eqxreg.Positive())
    ```

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> positive = eqxreg.Positive()
        >>> raw = positive.inverse(jnp.array([0.5, 2.0]))
        >>> with jnp.printoptions(precision=3):
        ...     print(positive(raw))
        [0.5 2. ]

        ```
    """

    map: str = eqx.field(static=True)

    def __init__(self, map: str = "softplus"):
        """**Arguments:**

        - `map`: `"softplus"` or `"exp"`. Defaults to `"softplus"`.

        **Raises:**

        - `ValueError`: if there is no map of this name.
        """
        if map not in _POSITIVE:
            names = " or ".join(f'"{name}"' for name in _POSITIVE)
            raise ValueError(f"`map` must be {names}, got {map!r}.")
        self.map = map

    def check(self, weight: Shaped) -> None:
        check_dtype(weight, complex_for="Positive")

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        self.check(raw)
        weight = _POSITIVE[self.map].forward(widen(raw)).astype(raw.dtype)
        # Far out, both maps round to zero, which is not in the set.
        return _keep_infinities(raw, jnp.maximum(weight, _smallest(raw.dtype)))

    def inverse(self, weight: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        """**Arguments:**

        - `weight`: a floating array with positive entries.

        **Returns:**

        The raw weight: `log(exp(weight) - 1)` or `log(weight)`.

        **Raises:**

        - `ValueError`: if an entry is not positive. For a traced weight, at run time,
            by `eqx.error_if`.
        """
        self.check(weight)
        weight = check_values(
            weight,
            weight > 0,
            "`Positive` needs a weight whose entries are all positive, and this one "
            "has others. Start inside: `eqx.tree_at(lambda l: l.weight, layer, "
            "jnp.abs(layer.weight) + 1e-3)` for a layer; for a model, "
            "`eqxreg.constrain(eqxreg.project_params(model, eqxreg.Box(1e-3, "
            "jnp.inf)), eqxreg.Positive())`.",
        )
        return _POSITIVE[self.map].inverse(widen(weight)).astype(weight.dtype)


class Interval(Parametrization):
    r"""The weights strictly between two bounds, as the image of all weights:
    $w_i = l_i + (u_i - l_i) / (1 + e^{-v_i})$.

    The bounds may be arrays, as those of [`eqxreg.Box`][]. A weight that is wrapped has
    to be inside; `eqxreg.project_params(model, eqxreg.Box(low, high))` brings it there.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> print(eqxreg.Interval(-1.0, 3.0)(jnp.array([0.0, 0.0])))
        [1. 1.]

        ```
    """

    lower: StoredBound
    upper: StoredBound

    def __init__(self, lower: Bound, upper: Bound):
        """**Arguments:**

        - `lower`, `upper`: the bounds $l < u$, finite: numbers, or arrays of the shape
            of the weight or of one that broadcasts to it.

        **Raises:**

        - `ValueError`: if a bound is not finite, `lower >= upper`, or, when called, if
            the shape of a bound does not broadcast to that of the weight.
        """
        hint = "For one bound only, shift `eqxreg.Positive`."
        check = ft.partial(check_bound, several=True, finite=True, hint=hint)
        given, names = (lower, upper), ("lower", "upper")
        stored = (
            check(lower, "lower", toward=math.inf),
            check(upper, "upper", toward=-math.inf),
        )
        self.lower, self.upper = check_order(given, stored, names, strict=True)

    def _in_order(self) -> "Interval":
        return in_order(self, ("lower", "upper"), strict=True)

    def check(self, weight: Shaped) -> None:
        _check_bounded(self, weight)

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        self.check(raw)
        wide = widen(raw)
        lower, upper = _bounds_like(self, raw, wide.dtype)
        share = jax.nn.sigmoid(wide)
        weight = (lower * (1 - share) + upper * share).astype(raw.dtype)
        # The outermost weights within, for rounding may have reached the bounds.
        lower, upper = _bounds_like(self, raw, raw.dtype)
        step = _smallest(raw.dtype)
        first = jnp.where(lower == 0, step, jnp.nextafter(lower, upper))
        last = jnp.where(upper == 0, -step, jnp.nextafter(upper, lower))
        inside = jnp.minimum(jnp.maximum(weight, first), last)
        return _keep_infinities(raw, inside)

    def inverse(self, weight: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        """**Arguments:**

        - `weight`: a floating array with entries strictly between the bounds.

        **Returns:**

        The raw weight: `log((weight - lower) / (upper - weight))`.

        **Raises:**

        - `ValueError`: if an entry is not strictly between the bounds. For a traced
            weight, at run time, by `eqx.error_if`.
        """
        self.check(weight)
        wide = widen(weight)
        lower, upper = _bounds_like(self, weight, wide.dtype)
        wide = check_values(
            wide,
            (wide > lower) & (wide < upper),
            "`Interval` needs a weight whose entries are all strictly between `lower` "
            "and `upper`, and this one has others. Start inside: `eqx.tree_at(lambda "
            "l: l.weight, layer, interval(layer.weight))` for a layer; for a model, "
            "`eqxreg.project_params(model, eqxreg.Box(low, high))` with `low` and "
            "`high` a little inside the bounds, and then `eqxreg.constrain`.",
        )
        raw = jnp.log(wide - lower) - jnp.log(upper - wide)
        return raw.astype(weight.dtype)


def _check_bounded(p: Box | Interval, weight: Shaped) -> None:
    check_dtype(weight, complex_for=type(p).__name__)
    check_broadcasts("lower", bound_shape(p.lower), weight)
    check_broadcasts("upper", bound_shape(p.upper), weight)


def _bounds_like(p: Box | Interval, weight: Array, dtype) -> tuple[Array, Array]:
    """The bounds in a dtype: scalars or, if they are several, of the weight's shape."""
    lower = bound_value(p.lower, dtype, toward=math.inf)
    upper = bound_value(p.upper, dtype)
    like = lambda bound: stretched(bound, weight) if bound.ndim else bound
    return like(lower), like(upper)


def _smallest(dtype) -> Array:
    """The smallest positive number that arithmetic does not flush to zero: float16 is
    computed with in float32, where its subnormal numbers are normal."""
    info = jnp.finfo(dtype)
    wider = info.tiny > jnp.finfo(jnp.float32).tiny
    return jnp.asarray(info.smallest_subnormal if wider else info.tiny, dtype)


def _keep_infinities(raw: Array, weight: Array) -> Array:
    return jnp.where(jnp.isinf(raw), raw, weight)
