"""Rates of decay, of penalties and of proximal steps: what they may be, and what they
are at one step."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int


def check_rate(
    rate: Any, name: str, *, schedules: bool = True, positive: bool = False
) -> Any:
    """`rate`, if it is a non-negative number, a scalar array or a schedule. What is
    traced is not looked into: `optax.inject_hyperparams` passes rates in every step."""
    if callable(rate) and not isinstance(rate, jax.Array):
        if schedules:
            return rate
        raise TypeError(
            f"`{name}` must be a number or a scalar array, and not a schedule: steps "
            f"are not counted here. Give `{name}=schedule(step)`."
        )
    if isinstance(rate, bool) or not isinstance(
        rate, (int, float, np.number, np.ndarray, jax.Array)
    ):
        raise TypeError(f"`{name}` must be a number or a scalar array, got {rate!r}.")
    if isinstance(rate, (jax.Array, np.ndarray)) and rate.ndim != 0:
        raise ValueError(
            f"`{name}` must be a scalar, got an array of shape {rate.shape}."
        )
    if isinstance(rate, Tracer):
        return rate
    number = float(rate)
    if not (0 <= number < math.inf) or (positive and number == 0):
        need = "positive" if positive else "non-negative"
        raise ValueError(f"`{name}` must be {need} and finite, got {number}.")
    return rate if isinstance(rate, jax.Array) else float(rate)


def rate_at(rate: Any, step: Int[Array, ""], dtype) -> Array:
    """A rate at one step, counted from 0 as Optax does, as a scalar array of `dtype`,
    the dtype of what it multiplies."""
    return jnp.asarray(rate(step) if callable(rate) else rate).astype(dtype)


def product(*rates: Any) -> Callable[[Int[Array, ""]], Array]:
    """The product of several rates, as a schedule."""

    def at(step: Int[Array, ""]) -> Array:
        return jnp.prod(jnp.stack([rate_at(r, step, float) for r in rates]))

    return at
