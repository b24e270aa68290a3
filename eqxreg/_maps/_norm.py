r"""Maps that move the norm of a weight, or of each of its units.

The work is done elsewhere: in `_rescale.py` where the nearest point is a multiple of
the weight; where it is not, for `ord` 1 and inf, in `_simplex.py` and
`_elementwise.py`.
"""

import abc
import math
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Inexact

from .._linalg import (
    Axis,
    AxisLike,
    check_axis,
    resolve_axes,
    tolerance,
    wide_dtype,
    widen,
)
from .._values import (
    Bound,
    Shaped,
    StoredBound,
    bound_value,
    check_bound,
    check_order,
    in_order,
)
from ._base import Parametrization, Projection
from ._checks import check_dtype
from ._elementwise import clip
from ._factored import OnlyMultiplied, is_factorable
from ._rescale import (
    Plan,
    at_most,
    exactly,
    factors,
    gain_factors,
    norms_of,
    rescale,
    towards,
    with_gain,
)
from ._simplex import project_to_l1_ball


class _NormMap(Projection):
    """What the maps of this file share: an `axis` that a weight must have, and a plan
    of what its norms over that are to be."""

    axis: eqx.AbstractVar[Axis]

    @abc.abstractmethod
    def _plan(self, dtype) -> tuple[Callable[..., Plan], tuple[Array, ...]]:
        """The plan for a weight of this dtype, and its bounds."""

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        self.check(raw)
        plan, bounds = self._plan(raw.dtype)
        return rescale(plan, resolve_axes(self.axis, raw.ndim), raw, *bounds)

    def _factored(self, raw: Inexact[Array, "..."]) -> OnlyMultiplied | None:
        plan, bounds = self._plan(raw.dtype)
        return _by_rows(raw, self.axis, lambda axes: factors(plan, axes, raw, *bounds))

    def check(self, weight: Shaped) -> None:
        check_dtype(weight)
        resolve_axes(self.axis, weight.ndim)

    def _sizes(self, weight: Inexact[Array, "..."]) -> Float[Array, "..."]:
        """The norms that are bounded, to be multiplied with a bound."""
        norms = norms_of(weight, resolve_axes(self.axis, weight.ndim))
        return norms.norm / norms.scale

    def _largest(self, weight: Inexact[Array, "..."]) -> Float[Array, ""]:
        return jnp.max(self._sizes(weight), initial=0)


class MaxNorm(_NormMap):
    r"""The weights, or units, of norm at most `max_norm`.

    For `ord=2`,

    $$w \mapsto w \min\left(1, \frac{c}{\lVert w \rVert_2}\right),$$

    and for each `ord` the nearest point of the ball. Inside the ball a weight is left
    alone, bit for bit, and the gradient is that of the identity; the boundary counts as
    inside, and so does a weight whose norm rounds to the bound. Outside, the gradient
    is the tangential part, times $c / \lVert w \rVert$.

    With `axis="unit"` (recommended) this is max-norm regularisation as it was proposed:
    a bound on the incoming weights of each unit or filter. Common bounds are 1 to 4.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> weight = jnp.array([[3.0, 4.0], [0.3, 0.4]])
        >>> with jnp.printoptions(precision=3):
        ...     print(eqxreg.MaxNorm(1.0, axis="unit")(weight))
        [[0.6 0.8]
         [0.3 0.4]]

        ```

    ??? cite

        Max-norm: [Dropout: A Simple Way to Prevent Neural Networks from
        Overfitting](https://jmlr.org/papers/v15/srivastava14a.html), Srivastava,
        Hinton, Krizhevsky, Sutskever and Salakhutdinov, JMLR 15 (2014).
    """

    max_norm: StoredBound
    axis: Axis = eqx.field(static=True)
    ord: int | float = eqx.field(static=True)

    def __init__(self, max_norm: Bound, axis: AxisLike = None, ord: int | float = 2):
        """**Arguments:**

        - `max_norm`: the bound $c$: a positive number, JAX scalar array or schedule.
        - `axis`: the axes that one norm is taken over: `None` for one norm of the whole
            weight, `"unit"` for every axis but the first, an int or a tuple of ints.
            Defaults to `None`.
        - `ord`: which norm: 1, 2 or `jnp.inf`. Defaults to 2.

        **Raises:**

        - `ValueError`: if `max_norm` is not positive and finite, or `axis` or `ord` is
            none of the above.
        """
        self.max_norm = check_bound(max_norm, "max_norm", minimum=0, strict=True)
        self.axis = check_axis(axis)
        if isinstance(ord, bool) or ord not in (1, 2, math.inf):
            raise ValueError(f"`ord` must be 1, 2 or `jnp.inf`, got {ord!r}.")
        self.ord = ord

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        self.check(raw)
        if self.ord == 1:
            axes = resolve_axes(self.axis, raw.ndim)
            wide = wide_dtype(raw.dtype)
            return project_to_l1_ball(raw, bound_value(self.max_norm, wide), axes)
        if self.ord == math.inf and not jnp.iscomplexobj(raw):
            bound = bound_value(self.max_norm, raw.dtype)
            return clip(raw, -bound, bound)
        if self.ord == math.inf:
            # The largest magnitude is bounded where each magnitude is.
            plan, bounds = self._plan(raw.dtype)
            return rescale(plan, (), raw, *bounds)
        return super().__call__(raw)

    def _largest(self, weight: Inexact[Array, "..."]) -> Float[Array, ""]:
        if self.ord == 2:
            return super()._largest(weight)
        magnitudes = jnp.abs(widen(weight))
        if self.ord == math.inf:
            return jnp.max(magnitudes, initial=0)
        sums = jnp.sum(magnitudes, axis=resolve_axes(self.axis, weight.ndim))
        return jnp.max(sums, initial=0)

    def _plan(self, dtype) -> tuple[Callable[..., Plan], tuple[Array, ...]]:
        return at_most, (bound_value(self.max_norm, wide_dtype(dtype)),)

    def _factored(self, raw: Inexact[Array, "..."]) -> OnlyMultiplied | None:
        return super()._factored(raw) if self.ord == 2 else None


class MinMaxNorm(_NormMap):
    r"""The weights, or units, of norm between `min_norm` and `max_norm`.

    $$w \mapsto \rho\, w\, \frac{\mathrm{clip}(\lVert w \rVert, a, b)}{\lVert w \rVert}
    + (1 - \rho)\, w.$$

    Between the bounds a weight is left alone, bit for bit. A zero vector has no
    direction: it stays zero, with the gradient of the identity, also if `min_norm` is
    positive.

    With `rate` $\rho < 1$ a weight moves only part of the way, as in Keras. The map is
    then not idempotent, and the bounds hold only in the limit of many applications.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> weight = jnp.array([[3.0, 4.0], [0.3, 0.4]])
        >>> with jnp.printoptions(precision=3):
        ...     print(eqxreg.MinMaxNorm(1.0, 2.0, axis="unit")(weight))
        [[1.2 1.6]
         [0.6 0.8]]

        ```
    """

    min_norm: StoredBound
    max_norm: StoredBound
    rate: float = eqx.field(static=True)
    axis: Axis = eqx.field(static=True)

    def __init__(
        self,
        min_norm: Bound,
        max_norm: Bound,
        rate: float | int | np.number = 1.0,
        axis: AxisLike = None,
    ):
        """**Arguments:**

        - `min_norm`: the lower bound $a$, not negative. A number, JAX scalar array or
            schedule.
        - `max_norm`: the upper bound $b$, positive and not below `min_norm`.
        - `rate`: how much of the way to go, in (0, 1]. Defaults to 1: all of it.
        - `axis`: the axes that one norm is taken over, as in [`eqxreg.MaxNorm`][].
            Defaults to `None`, one norm of the whole weight; `"unit"` is recommended.

        **Raises:**

        - `ValueError`: if a bound is out of range, `min_norm > max_norm`, `rate` is not
            in (0, 1], or `axis` is unknown.
        """
        given, names = (min_norm, max_norm), ("min_norm", "max_norm")
        stored = (
            check_bound(min_norm, "min_norm", minimum=0),
            check_bound(max_norm, "max_norm", minimum=0, strict=True),
        )
        self.min_norm, self.max_norm = check_order(given, stored, names, strict=False)
        if not isinstance(rate, int | float | np.number) or not 0 < rate <= 1:
            raise ValueError(f"`rate` must be in (0, 1], got {rate!r}.")
        self.rate = float(rate)
        self.axis = check_axis(axis)

    def _in_order(self) -> "MinMaxNorm":
        return in_order(self, ("min_norm", "max_norm"), strict=False)

    def _plan(self, dtype) -> tuple[Callable[..., Plan], tuple[Array, ...]]:
        wide = wide_dtype(dtype)
        low = bound_value(self.min_norm, wide, toward=math.inf)
        high = bound_value(self.max_norm, wide)
        return towards(self.rate), (low, high)

    def contains(
        self, weight: Inexact[Array, "..."], tol: ArrayLike | None = None
    ) -> Bool[Array, ""]:
        return _contains(self.axis, weight, self.min_norm, self.max_norm, tol)


class UnitNorm(_NormMap):
    r"""The weights, or units, of norm exactly `norm`: the sphere.

    $$w \mapsto \frac{c\, w}{\lVert w \rVert}.$$

    The gradient is the tangential part, times $c / \lVert w \rVert$, everywhere but at
    zero. A zero vector has no direction: it stays zero, with the gradient of the
    identity, so that it can leave.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> weight = jnp.array([[3.0, 4.0], [0.0, 0.0]])
        >>> with jnp.printoptions(precision=3):
        ...     print(eqxreg.UnitNorm(axis="unit")(weight))
        [[0.6 0.8]
         [0.  0. ]]

        ```
    """

    norm: StoredBound
    axis: Axis = eqx.field(static=True)
    _degree: ClassVar[int | None] = 0

    def __init__(self, norm: Bound = 1.0, axis: AxisLike = None):
        """**Arguments:**

        - `norm`: the norm $c$: a positive number, JAX scalar array or schedule.
            Defaults to 1.
        - `axis`: the axes that one norm is taken over, as in [`eqxreg.MaxNorm`][].
            Defaults to `None`, one norm of the whole weight; `"unit"` is recommended.

        **Raises:**

        - `ValueError`: if `norm` is not positive and finite, or `axis` is unknown.
        """
        self.norm = check_bound(norm, "norm", minimum=0, strict=True)
        self.axis = check_axis(axis)

    def _plan(self, dtype) -> tuple[Callable[..., Plan], tuple[Array, ...]]:
        return exactly, (bound_value(self.norm, wide_dtype(dtype)),)

    def contains(
        self, weight: Inexact[Array, "..."], tol: ArrayLike | None = None
    ) -> Bool[Array, ""]:
        return _contains(self.axis, weight, self.norm, self.norm, tol)


class WeightNorm(Parametrization):
    r"""$w = g\, v / \lVert v \rVert$, with a trained gain for each slice.

    The one map with something to train: `bind` sets the gain to the norms of the weight
    that is wrapped. `WeightNormConstraint` is its public face.
    """

    gain: Inexact[Array, "..."] | None
    axis: Axis = eqx.field(static=True)
    trained: ClassVar[tuple[str, ...]] = ("gain",)
    _degree: ClassVar[int | None] = 0

    def __init__(self, axis: AxisLike = "unit", gain: Array | None = None):
        self.gain = gain
        self.axis = check_axis(axis)

    def check(self, weight: Shaped) -> None:
        check_dtype(weight)
        resolve_axes(self.axis, weight.ndim)

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        return with_gain(resolve_axes(self.axis, raw.ndim), raw, self._bound_gain)

    def _factored(self, raw: Inexact[Array, "..."]) -> OnlyMultiplied | None:
        gain = self._bound_gain
        return _by_rows(raw, self.axis, lambda axes: gain_factors(axes, raw, gain))

    @property
    def _bound_gain(self) -> Inexact[Array, "..."]:
        if self.gain is None:
            raise ValueError("Weight normalisation has no gain before it is bound.")
        return self.gain

    def inverse(self, weight: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        return weight

    def bind(
        self, weight: Inexact[Array, "*shape"]
    ) -> tuple["WeightNorm", Inexact[Array, "*shape"]]:
        norms = norms_of(weight, resolve_axes(self.axis, weight.ndim))
        # In single precision at least: the norm of a half-precision weight may be out
        # of its range.
        gain = norms.norm / norms.scale
        return WeightNorm(self.axis, gain), weight


def _by_rows(
    raw: Inexact[Array, "..."],
    axis: Axis,
    factors: Callable[[tuple[int, ...]], Float[Array, "..."]],
) -> OnlyMultiplied | None:
    """`raw` times `factors` of the axes of its norms, if these are of whole rows."""
    axes = resolve_axes(axis, raw.ndim)
    if 1 not in axes or not is_factorable(raw):
        return None
    return OnlyMultiplied(raw, factors(axes))


def _contains(
    axis: Axis,
    weight: Inexact[Array, "..."],
    low: StoredBound,
    high: StoredBound,
    tol: ArrayLike | None,
) -> Bool[Array, ""]:
    """Whether all norms are between the bounds. By norms, not by the distance, for a
    zero vector is far from a sphere and yet stays where it is."""
    norms = norms_of(weight, resolve_axes(axis, weight.ndim))
    wide = norms.norm.dtype
    tol = tolerance(weight.dtype) if tol is None else tol
    too_short = norms.below(bound_value(low, wide) * (1 - tol))
    too_long = norms.above(bound_value(high, wide) * (1 + tol))
    return jnp.all(jnp.isfinite(norms.norm) & ~too_short & ~too_long)
