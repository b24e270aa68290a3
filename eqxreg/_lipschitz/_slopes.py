r"""Lipschitz constants of functions: the usual activations, in the l2 norm.

Of an elementwise function it is the largest slope. All numbers are rounded up.
"""

import functools as ft
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax


Shape: TypeAlias = tuple[int, ...] | None


class NoBound(ValueError):
    """There is no bound. The message is the end of a sentence on a layer; whoever knows
    where the layer is, completes it."""


_identity = inspect.signature(eqx.nn.MLP).parameters["final_activation"].default

# By `approximate`.
_GELU = {False: 1.1289042, True: 1.1289931}

_CONSTANTS: list[tuple[float, tuple[Callable, ...]]] = [
    (
        1.0,
        (
            _identity,
            jax.nn.celu,
            jax.nn.elu,
            jax.nn.hard_tanh,
            jax.nn.identity,
            jax.nn.leaky_relu,
            jax.nn.log_sigmoid,
            jax.nn.logsumexp,
            jax.nn.relu,
            jax.nn.relu6,
            jax.nn.soft_sign,
            jax.nn.softplus,
            jax.nn.sparse_plus,
            jax.nn.squareplus,
            jax.nn.tanh,
            jnp.abs,
            jnp.arcsinh,
            jnp.arctan,
            jnp.cos,
            jnp.negative,
            jnp.ravel,
            jnp.sin,
            jnp.sort,
            jnp.squeeze,
            jnp.tanh,
            jnp.transpose,
            lax.stop_gradient,
            lax.tanh,
        ),
    ),
    (0.25, (jax.nn.sigmoid, lax.logistic)),
    (0.5, (jax.nn.softmax, jax.nn.sparse_sigmoid)),
    (0.1666666666666667, (jax.nn.hard_sigmoid,)),
    (1.5, (jax.nn.hard_silu,)),
    (1.7580993408473769, (jax.nn.selu,)),
    (_GELU[True], (jax.nn.gelu,)),
    (1.0998394, (jax.nn.silu,)),
    (1.0884982, (jax.nn.mish,)),
]

_UNBOUNDED = (jax.nn.glu, jnp.exp, jnp.square, jnp.log, jnp.sqrt)


# What an argument that is given by `functools.partial` does to the constant.
_ARGUMENTS: dict[Callable, dict[str, Callable[[Any], float]]] = {
    jax.nn.celu: {"alpha": lambda a: 1.0 if a > 0 else math.nan},
    jax.nn.elu: {"alpha": lambda a: max(1.0, abs(a))},
    jax.nn.gelu: {"approximate": lambda a: _GELU[bool(a)]},
    jax.nn.leaky_relu: {"negative_slope": lambda a: max(1.0, abs(a))},
    jax.nn.softmax: {"axis": lambda _: 0.5},
    jax.nn.squareplus: {"b": lambda b: 1.0 if b >= 0 else math.nan},
}


def slope(function: Callable, input_shape: Shape) -> float:
    """The Lipschitz constant of a known function, or `NoBound`."""
    if isinstance(function, ft.partial):
        return _slope_of_partial(function)
    if function is jax.nn.log_softmax:
        return _slope_of_log_softmax(input_shape)
    name = getattr(function, "__name__", repr(function))
    if any(function is f for f in _UNBOUNDED):
        raise NoBound(
            f"is `{name}`, whose slope has no bound. Use another activation, such as "
            "`jax.nn.relu` or `eqxreg.MaxMin()`."
        )
    for constant, functions in _CONSTANTS:
        if any(function is f for f in functions):
            return constant
    raise NoBound(
        f"is the function `{name}`, for which no Lipschitz bound is known. Use a known "
        "activation, such as `jax.nn.relu` or `eqxreg.MaxMin()`, or make it an "
        "`eqx.Module` and register its bound with "
        "`@eqxreg.lipschitz_bound.register(...)`."
    )


def _slope_of_partial(function: ft.partial) -> float:
    rules = next((r for f, r in _ARGUMENTS.items() if f is function.func), {})
    given = function.keywords
    plain = all(isinstance(v, bool | int | float) for v in given.values())
    if not function.args and plain and given.keys() <= rules.keys():
        constants = [rules[name](value) for name, value in given.items()]
        constant = constants[0] if constants else slope(function.func, None)
        if len(constants) <= 1 and not math.isnan(constant):
            return constant
    name = getattr(function.func, "__name__", repr(function.func))
    raise NoBound(
        f"is a `functools.partial` of `{name}`, for which no Lipschitz bound is known "
        "with these arguments. Make it an `eqx.Module` and register its bound with "
        "`@eqxreg.lipschitz_bound.register(...)`."
    )


def _slope_of_log_softmax(input_shape: Shape) -> float:
    # The norm of I - 1pᵀ is convex in p, and so largest where p is a unit vector.
    if not input_shape:
        raise NoBound(
            "is `log_softmax`, whose bound is the square root of the number of "
            "classes: give `input_shape`."
        )
    return math.nextafter(math.sqrt(input_shape[-1]), math.inf)
