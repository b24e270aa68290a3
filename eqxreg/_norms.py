"""Norms that are safe in value and gradient, and the handling of axes and precision.

Every map that measures a weight goes through `scaled_norm`; every map that returns a
weight in half precision goes through `narrow`. Nothing here knows what a constraint is.
"""

import functools as ft
import operator
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact


Axis: TypeAlias = None | str | int | tuple[int, ...]
"""`None`, `"unit"`, an axis or several axes."""

AxisLike: TypeAlias = None | str | SupportsIndex | Sequence[SupportsIndex]
"""What an `Axis` may be given as."""


def check_axis(axis: AxisLike) -> Axis:
    """`axis` in its canonical form, or an error that lists the forms there are."""
    if axis is None or isinstance(axis, str) and axis == "unit":
        return axis
    single = isinstance(axis, str | SupportsIndex)
    entries: Sequence[Any] = [axis] if single else axis
    try:
        axes = tuple(_index(a) for a in entries)
    except TypeError:
        axes = None
    if axes is None or len(set(axes)) != len(axes):
        raise ValueError(
            '`axis` must be None (one norm for the whole weight), "unit" (every axis '
            f"but the first), an int, or a tuple of different ints, got {axis!r}."
        )
    return axes[0] if single else axes


def _index(axis: Any) -> int:
    if isinstance(axis, bool):
        raise TypeError("a boolean is no axis")
    return operator.index(axis)


def resolve_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """The non-negative axes that one norm of a weight of rank `ndim` is taken over."""
    if axis is None:
        return tuple(range(ndim))
    if isinstance(axis, str):
        if ndim == 0:
            raise ValueError(
                '`axis="unit"` needs a weight of rank 1 or more, got a scalar.'
            )
        return tuple(range(1, ndim))
    entries = axis if isinstance(axis, tuple) else (axis,)
    if any(not -ndim <= a < ndim for a in entries):
        raise ValueError(
            f"`axis={axis!r}` is out of range for a weight of rank {ndim}, whose axes "
            f"are 0 to {ndim - 1}."
        )
    axes = tuple(a % ndim for a in entries)
    if len(set(axes)) != len(axes):
        raise ValueError(f"`axis={axis!r}` names an axis of rank {ndim} twice.")
    return axes


def real_dtype(dtype) -> jnp.dtype:
    """The dtype of the magnitudes of an array of this dtype."""
    return jnp.finfo(dtype).dtype


def holds(dtype, other) -> bool:
    """Whether a floating dtype holds all numbers of another."""
    own, other = jnp.finfo(dtype), jnp.finfo(other)
    return own.nmant >= other.nmant and own.maxexp >= other.maxexp


def wide_dtype(dtype) -> jnp.dtype:
    """The real dtype that norms of a weight of this dtype are accumulated in."""
    real = jnp.finfo(dtype)
    return real.dtype if real.bits >= 32 else jnp.dtype(jnp.float32)


def is_half(dtype) -> bool:
    """Whether arrays of this dtype are computed with in a wider one."""
    return jnp.finfo(dtype).bits < 32


def margin(dtype) -> float:
    """How far under a bound, relatively, maps aim: above the rounding error of a norm
    and of the product that follows it, far below what anyone could notice."""
    return 8 * float(jnp.finfo(wide_dtype(dtype)).eps)


def tolerance(dtype) -> float:
    """How far from a bound, relatively, a weight of this dtype may be and count as on
    it: what rounding a weight that was aimed at the bound can do, and a little more."""
    slack = 64 * float(jnp.finfo(wide_dtype(dtype)).eps)
    return slack + (float(jnp.finfo(dtype).eps) if is_half(dtype) else 0.0)


def widen(weight: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
    """`weight` in at least single precision."""
    return weight.astype(wide_dtype(weight.dtype)) if is_half(weight.dtype) else weight


def squared_magnitude(x: Inexact[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`|x|²`, elementwise and real."""
    if jnp.iscomplexobj(x):
        return lax.real(x) ** 2 + lax.imag(x) ** 2
    return x * x


@jax.custom_jvp
def with_derivative_of(value: Array, source: Array) -> Array:
    """`value`, which differentiates as `source` does."""
    return value


@with_derivative_of.defjvp
def _(primals, tangents):
    value, _ = primals
    _, tangent = tangents
    return value, tangent


def narrow(x: Inexact[Array, "*shape"], dtype: jnp.dtype) -> Inexact[Array, "*shape"]:
    """`x` in `dtype`, rounded towards zero, so that no norm grows by it.

    The derivative is that of the cast.
    """
    if x.dtype == dtype:
        return x
    nearest = x.astype(dtype)
    bits = lax.bitcast_convert_type(nearest, jnp.uint16)
    too_large = jnp.abs(nearest.astype(x.dtype)) > jnp.abs(x)
    # Floats are sign and magnitude: one less in the bits is one step towards zero.
    # An infinite `x` is not larger than itself, so that infinities stay.
    lower = lax.bitcast_convert_type(bits - too_large.astype(jnp.uint16), dtype)
    return with_derivative_of(lower, nearest)


def scaled_norm(
    weight: Inexact[Array, "*shape"], axes: tuple[int, ...]
) -> tuple[Float[Array, "*norms"], Float[Array, "*norms"]]:
    r"""Euclidean norms over `axes` that neither overflow nor underflow.

    The plain sum of squares serves nearly always. Only when one of the sums is not
    finite, or so small that squares may have been flushed to zero, is everything
    computed again with each slice scaled by a power of two.

    **Arguments:**

    - `weight`: an array of at least single precision, floating or complex.
    - `axes`: non-negative ints; the axes that one norm is taken over.

    **Returns:**

    `(norm, scale)`, real and with `axes` kept at size one: `norm` is that of
    `weight * scale`, where `scale` is a power of two, nearly always 1. Its derivative
    is $\mathrm{Re}\langle w, \dot w\rangle / \lVert w\rVert$, and zero at zero.
    """
    return _scaled_norm(weight, axes)


@ft.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _scaled_norm(weight, axes):
    return _batched_scaled_norm(weight, axes)


@_scaled_norm.defjvp
def _(axes, primals, tangents):
    (weight,), (tangent,) = primals, tangents
    norm, scale = _scaled_norm(weight, axes)
    factor = scale.astype(weight.dtype)
    along = jnp.real(jnp.conj(weight * factor) * (tangent * factor))
    inner = jnp.sum(along, axis=axes, keepdims=True)
    slope = inner / jnp.where(norm > 0, norm, 1)
    return (norm, scale), (slope, jnp.zeros_like(scale))


# Compiled as a whole, for outside of `jit` a `cond` is compiled anew in every call.
@ft.partial(jax.jit, static_argnums=1, inline=True)
def _batched_scaled_norm(weight, axes):
    # A `vmap` would turn the `cond` below into a `select` that always pays for both
    # branches. Norms batch by having one more axis, so that is what we do instead.
    @jax.custom_batching.custom_vmap
    def norms(weight):
        return _norm_by_cases(weight, axes)

    @norms.def_vmap
    def _(axis_size, in_batched, weight):
        del axis_size, in_batched
        return _batched_scaled_norm(weight, tuple(a + 1 for a in axes)), (True, True)

    return norms(weight)


def _norm_by_cases(weight, axes):
    squares = jnp.sum(squared_magnitude(weight), axis=axes, keepdims=True)
    scale = _scale_for(squares, weight.size // max(squares.size, 1))

    def plain(weight, squares, scale):
        return jnp.sqrt(squares)

    def careful(weight, squares, scale):
        scaled = weight * scale.astype(weight.dtype)
        return jnp.sqrt(jnp.sum(squared_magnitude(scaled), axis=axes, keepdims=True))

    norm = lax.cond(jnp.all(scale == 1), plain, careful, weight, squares, scale)
    return norm, scale


def _scale_for(squares: Float[Array, "*norms"], count: int) -> Float[Array, "*norms"]:
    """The power of two to scale slices of `count` entries by, so that sums of their
    squares are in range, from these sums as they are: 1 unless they are not finite, or
    so small that what was flushed to zero may be more than rounding."""
    info = jnp.finfo(squares.dtype)
    smallest = float(info.tiny) / float(info.eps) * max(count, 1)
    # Two fixed powers of two bring all that is out of range into it.
    up, down = 2.0 ** (0.625 * info.maxexp // 1), 2.0 ** -(0.7 * info.maxexp // 1)
    one = jnp.ones_like(squares)
    scale = jnp.where(squares < smallest, up * one, one)
    return jnp.where(jnp.isfinite(squares), scale, down * one)


def frobenius_norm(x: Inexact[Array, "..."]) -> Float[Array, ""]:
    """The Euclidean norm of all entries, in at least single precision. Its derivative
    at zero is zero."""
    norm, scale = scaled_norm(widen(x), tuple(range(x.ndim)))
    return jnp.reshape(norm / scale, ())


def per_layer(
    fn: Callable, weight: Inexact[Array, "..."], rank: int, *others: Any
) -> Any:
    """`fn(weight, *others)` for each array of rank `rank` in the stack `weight`, and
    what goes with it in the others."""
    for _ in range(weight.ndim - rank):
        fn = jax.vmap(fn)
    return fn(weight, *others)


def all_finite(x: Inexact[Array, "..."]) -> Bool[Array, ""]:
    """Whether `x` has neither NaNs nor infinities."""
    return jnp.all(jnp.isfinite(x))


@jax.custom_batching.custom_vmap
def anywhere(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """`flag`; under `vmap`, whether any of them is true. So a `cond` on it stays one,
    where `vmap` would turn it into a `select` that pays for both sides every time."""
    return flag


@anywhere.def_vmap
def _(axis_size, in_batched, flag):
    del axis_size, in_batched
    return anywhere(jnp.any(flag, axis=0)), False
