"""Norms that are safe in value and gradient. Every map that measures a weight goes
through `scaled_norm`."""

import functools as ft
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact

from ._platforms import on_gpu, read_again
from ._precision import is_half, wide_dtype, widen


def squared_magnitude(x: Inexact[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`|x|²`, elementwise and real."""
    if jnp.iscomplexobj(x):
        return lax.real(x) ** 2 + lax.imag(x) ** 2
    return x * x


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
    weight, tangent = widen(weight), widen(tangent)
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
        at_once = ft.partial(_norm_at_once, axes=axes)
        return on_gpu(at_once, ft.partial(_norm_by_cases, axes=axes), weight)

    @norms.def_vmap
    def _(axis_size, in_batched, weight):
        del axis_size, in_batched
        return _batched_scaled_norm(weight, tuple(a + 1 for a in axes)), (True, True)

    return norms(weight)


def _norm_by_cases(weight, axes):
    """One pass nearly always, and two if something is out of range."""
    weight = read_again(weight) if is_half(weight.dtype) else weight
    squares = _squares(weight, axes)
    scale = _scale_for(squares, _count(weight, axes))

    def plain(weight, squares, scale):
        return jnp.sqrt(squares)

    def careful(weight, squares, scale):
        return jnp.sqrt(_squares(weight, axes, scale))

    norm = lax.cond(jnp.all(scale == 1), plain, careful, weight, squares, scale)
    return norm, scale


def _norm_at_once(weight, axes):
    """One pass always, which sums the squares at three scales."""
    wide = widen(weight)
    scales = (1.0, *_scales(wide_dtype(weight.dtype)))
    squares = [squared_magnitude(wide * jnp.asarray(s, wide.dtype)) for s in scales]
    zeros = [jnp.zeros((), x.dtype) for x in squares]
    add = lambda xs, ys: [x + y for x, y in zip(xs, ys, strict=True)]
    sums = lax.reduce(squares, zeros, add, axes)
    plain, raised, lowered = (jnp.expand_dims(x, axes) for x in sums)
    scale = _scale_for(plain, _count(weight, axes))
    others = jnp.where(scale > 1, raised, lowered)
    return jnp.sqrt(jnp.where(scale == 1, plain, others)), scale


def _squares(weight, axes, scale=None):
    """The sums of squares of a weight, or of a weight times a number for each slice.
    One in half precision is read as it is, and never written in another."""
    wide = widen(weight)
    wide = wide if scale is None else wide * scale.astype(wide.dtype)
    return jnp.sum(squared_magnitude(wide), axis=axes, keepdims=True)


def _scales(dtype) -> tuple[float, float]:
    """Two powers of two that bring all that is out of range into it."""
    most = jnp.finfo(dtype).maxexp
    return 2.0 ** (0.625 * most // 1), 2.0 ** -(0.7 * most // 1)


def _scale_for(squares: Float[Array, "*norms"], count: int) -> Float[Array, "*norms"]:
    """The power of two to scale slices of `count` entries by, so that sums of their
    squares are in range, from these sums as they are: 1 unless they are not finite, or
    so small that what was flushed to zero may be more than rounding."""
    info = jnp.finfo(squares.dtype)
    smallest = float(info.tiny) / float(info.eps) * max(count, 1)
    up, down = _scales(squares.dtype)
    one = jnp.ones_like(squares)
    scale = jnp.where(squares < smallest, up * one, one)
    return jnp.where(jnp.isfinite(squares), scale, down * one)


def _count(weight, axes) -> int:
    return math.prod(weight.shape[axis] for axis in axes)


def frobenius_norm(x: Inexact[Array, "..."]) -> Float[Array, ""]:
    """The Euclidean norm of all entries, in at least single precision. Its derivative
    at zero is zero."""
    norm, scale = scaled_norm(x, tuple(range(x.ndim)))
    return jnp.reshape(norm / scale, ())


def all_finite(x: Inexact[Array, "..."]) -> Bool[Array, ""]:
    """Whether `x` has neither NaNs nor infinities."""
    return jnp.all(jnp.isfinite(x))
