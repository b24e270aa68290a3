"""Rates of decay, of penalties and of proximal steps: what they may be."""

import math
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def check_rate(rate: Any, name: str, *, schedules: bool = True) -> Any:
    """`rate`, if it is a non-negative number, a scalar array or a schedule. What is
    traced is not looked into: `optax.inject_hyperparams` passes rates in every step."""
    if callable(rate) and not isinstance(rate, jax.Array):
        if schedules:
            return rate
        raise TypeError(
            f"`{name}` is a schedule, and a penalty does not count steps: give "
            f"`{name}=schedule(step)`."
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
    if not (0 <= float(rate) < math.inf):
        raise ValueError(
            f"`{name}` must be non-negative and finite, got {float(rate)}."
        )
    return rate if isinstance(rate, jax.Array) else float(rate)
