"""Rates of decay, of penalties and of proximal steps: what they may be, and what they
are at one step."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int


def check_rate(
    rate: Any, name: str, *, schedules: bool = True, positive: bool = False
) -> Any:
    """`rate`, if it is a non-negative number, a scalar array or a schedule. What is
    traced, as by `optax.inject_hyperparams`, and what a schedule gives, is checked when
    it is known."""
    if callable(rate) and not isinstance(rate, jax.Array):
        if schedules:
            return _Scheduled(rate, name, positive)
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
    need = f"{'positive' if positive else 'non-negative'} and finite"
    if isinstance(rate, Tracer):
        fine = (rate > 0 if positive else rate >= 0) & (rate < math.inf)
        return eqx.error_if(rate, ~fine, f"`{name}` must be {need}.")
    number = as_float(rate)
    if not (0 <= number < math.inf) or (positive and number == 0):
        raise ValueError(f"`{name}` must be {need}, got {number}.")
    return rate if isinstance(rate, jax.Array) else number


def as_float(number: Any) -> float:
    """`number` as a Python float; infinite, if it is an integer too large for one."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def rate_at(rate: Any, step: Int[Array, ""]) -> Array:
    """A rate at one step, counted from 0 as Optax does, as a scalar array, to be cast
    to the dtype of what it multiplies."""
    return jnp.asarray(rate(step) if callable(rate) else rate)


def product(*rates: Any) -> Callable[[Int[Array, ""]], Array]:
    """The product of several rates, as a schedule."""
    return _Product(rates)


@dataclasses.dataclass(frozen=True)
class _Scheduled:
    """A schedule of which each value is checked as a number would be."""

    schedule: Callable[[Any], Any]
    name: str
    positive: bool

    def __call__(self, step: Int[Array, ""]) -> Any:
        now = self.schedule(step)
        return check_rate(now, self.name, schedules=False, positive=self.positive)


@dataclasses.dataclass(frozen=True)
class _Product:
    rates: tuple[Any, ...]

    def __call__(self, step: Int[Array, ""]) -> Array:
        return jnp.prod(jnp.stack([rate_at(r, step).astype(float) for r in self.rates]))
