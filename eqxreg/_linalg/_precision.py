"""Precision: what is computed in, how far from a bound is on it, and rounding."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact


def real_dtype(dtype) -> jnp.dtype:
    """The dtype of the magnitudes of an array of this dtype."""
    return jnp.finfo(dtype).dtype


def holds(dtype, other) -> bool:
    """Whether a floating dtype holds all numbers of another."""
    own, other = jnp.finfo(dtype), jnp.finfo(other)
    return own.nmant >= other.nmant and own.maxexp >= other.maxexp


def holds_range(dtype, other) -> bool:
    """Whether a floating dtype has numbers as large as those of another."""
    return jnp.finfo(dtype).maxexp >= jnp.finfo(other).maxexp


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
