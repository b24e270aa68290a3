"""What a weight has to be for a map to be applied to it, and a method to be known."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Inexact


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


def check_kept(p: Any, given: Any, result: Any, method: str = "") -> Any:
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


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def check_method(method: Any, known: tuple[str, ...], default: str) -> Any:
    """`method`, or an error that lists the ones there are."""
    if method not in (None, *known):
        names = ", ".join(f'"{name}"' for name in known)
        raise ValueError(
            f"`method` must be {names} or None ({default}), got {method!r}."
        )
    return method
