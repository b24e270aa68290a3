r"""The simplex, and with it the ball of the 1-norm.

The nearest point of the simplex is $\max(a_i - \tau, 0)$ with the one $\tau$ for which
the entries have the right sum. The nearest point of the ball of the 1-norm has the
magnitudes that are nearest to $|w|$ in the simplex, and the signs or phases of $w$.

$\tau$ is found by sums over the slice alone (Michelot, 1986): from all entries that may
be positive, those below the present $\tau$ are dropped until none is. So there is
nothing to sort, and nothing to gather if the weight is sharded.
"""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact

from .._linalg import (
    Axis,
    AxisLike,
    check_axis,
    margin,
    narrow,
    resolve_axes,
    scaled_norm,
    tolerance,
    widen,
    with_derivative_of,
)
from .._values import Bound, Shaped, StoredBound, bound_value, check_bound
from ._base import Projection
from ._checks import check_dtype


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _nearest(
    axes: tuple[int, ...], x: Float[Array, "*shape"], total: Float[Array, ""]
) -> Float[Array, "*shape"]:
    """The point that is nearest to `x` among those whose slices over `axes` are in the
    simplex of this `total`."""
    sums = ft.partial(jnp.sum, axis=axes, keepdims=True)
    # Only entries within `total` of the largest can be positive at the end. Measured
    # from there, nothing is lost in large entries, and nothing overflows.
    gap = jnp.maximum(x - jnp.max(x, axis=axes, keepdims=True), -2 * total)

    def threshold(positive: Bool[Array, "*shape"]) -> Float[Array, "*sums"]:
        count = jnp.maximum(sums(positive.astype(x.dtype)), 1)
        return (sums(jnp.where(positive, gap, 0)) - total) / count

    def unsettled(carry):
        return carry[1]

    def drop(carry):
        positive, _ = carry
        fewer = positive & (gap > threshold(positive))
        return fewer, jnp.any(fewer != positive)

    start = gap > -total, jnp.asarray(True)
    positive, _ = lax.while_loop(unsettled, drop, start)
    point = jnp.where(positive, jnp.maximum(gap - threshold(positive), 0), 0)
    # The sum is right but for rounding; this makes it so to the last few bits.
    sum = sums(point)
    return point * (total * (1 - margin(x.dtype)) / jnp.where(sum > 0, sum, 1))


@_nearest.defjvp
def _(axes, primals, tangents):
    point = _nearest(axes, *primals)
    support = (point > 0).astype(point.dtype)
    moved = support * tangents[0]
    count = jnp.maximum(jnp.sum(support, axis=axes, keepdims=True), 1)
    mean = jnp.sum(moved, axis=axes, keepdims=True) / count
    return point, moved - support * mean


def project_to_l1_ball(
    weight: Inexact[Array, "*shape"], bound: Float[Array, ""], axes: tuple[int, ...]
) -> Inexact[Array, "*shape"]:
    """The nearest weight whose slices over `axes` have 1-norm at most `bound`."""
    if weight.size == 0:
        return weight
    wide = widen(weight)
    norm, scale = scaled_norm(wide, ())
    magnitude = norm / scale
    too_long = jnp.sum(magnitude, axis=axes, keepdims=True) > bound
    nearest = _nearest(axes, magnitude, bound)
    # The sign or the phase; nothing, at zero.
    size = jnp.where(norm > 0, norm, 1)
    direction = wide * scale.astype(wide.dtype) / size.astype(wide.dtype)
    moved = narrow(direction * nearest.astype(wide.dtype), weight.dtype)
    return jnp.where(too_long, moved, weight)


class Simplex(Projection):
    r"""The weights, along `axis`, that are non-negative and sum to `total`.

    The nearest such point is $w_i \mapsto \max(w_i - \tau, 0)$, where $\tau$ makes the
    sum right. It is sparse: entries far below the largest become exact zeros. The
    derivative removes the mean over the positive entries, and is zero for the others.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> weight = jnp.array([1.5, 1.0, -2.0])
        >>> with jnp.printoptions(precision=3):
        ...     print(eqxreg.Simplex()(weight))
        [0.75 0.25 0.  ]

        ```

    ??? cite

        [A finite algorithm for finding the projection of a point onto the canonical
        simplex of R^n](https://doi.org/10.1007/BF00938486), Michelot, 1986; for the
        ball of the 1-norm, [Efficient Projections onto the l1-Ball for Learning in High
        Dimensions](https://doi.org/10.1145/1390156.1390191), Duchi, Shalev-Shwartz,
        Singer and Chandra, ICML 2008.
    """

    total: StoredBound
    axis: Axis = eqx.field(static=True)

    def __init__(self, total: Bound = 1.0, axis: AxisLike = -1):
        """**Arguments:**

        - `total`: the sum: a positive number, JAX scalar array or schedule. Defaults
            to 1.
        - `axis`: the axes that one sum is taken over: an int, a tuple of ints, `"unit"`
            for every axis but the first, or `None` for all. Defaults to the last.

        **Raises:**

        - `ValueError`: if `total` is not positive and finite, or `axis` is unknown.
        """
        self.total = check_bound(total, "total", minimum=0, strict=True)
        self.axis = check_axis(axis)

    def check(self, weight: Shaped) -> None:
        check_dtype(weight, complex_for="Simplex")
        resolve_axes(self.axis, weight.ndim)

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        self.check(raw)
        if raw.size == 0:
            return raw
        axes = resolve_axes(self.axis, raw.ndim)
        wide = widen(raw)
        total = bound_value(self.total, wide.dtype)
        sum = jnp.sum(wide, axis=axes, keepdims=True)
        fits = (sum <= total) & (sum >= total * (1 - tolerance(raw.dtype)))
        fits = fits & jnp.all(wide >= 0, axis=axes, keepdims=True)
        moved = narrow(_nearest(axes, wide, total), raw.dtype)
        moved = jnp.where(jnp.isfinite(raw), moved, raw)
        # A point of the simplex keeps its bits, but its derivative is tangential too.
        return with_derivative_of(jnp.where(fits, raw, moved), moved)
