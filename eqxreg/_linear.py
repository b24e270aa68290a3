"""The linear part of a layer, as a function of its weight.

A convolution is a matrix that nobody writes down: what is known of it is its product
with an image, and JAX transposes that.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._singular import LinearMap


def check_input_shape(input_shape: Any) -> tuple[int, ...]:
    """`input_shape` as a tuple of ints, or an error."""
    entries = tuple(input_shape) if isinstance(input_shape, tuple | list) else ()
    are_ints = [isinstance(n, int | np.integer) for n in entries]
    if not entries or not all(are_ints) or min(entries) < 0:
        raise ValueError(
            "`input_shape` must be the full shape of an input without batch, "
            f"`(channels, *spatial)`, as non-negative ints, got {input_shape!r}."
        )
    return tuple(int(n) for n in entries)


def linear_part(
    layer: Any, weight_name: str, input_shape: tuple[int, ...]
) -> Callable[[Array], LinearMap]:
    """The linear part of an affine layer with one input and one output.

    **Arguments:**

    - `layer`: the layer that owns the weight, such as an `eqx.nn.Conv`.
    - `weight_name`: the name of the weight in it.
    - `input_shape`: the shape of an input.

    **Returns:**

    A function from a weight to a map between flattened inputs and outputs. It depends
    on the weight linearly.
    """
    size = math.prod(input_shape)

    def linear(weight: Array) -> LinearMap:
        where = lambda node: getattr(node, weight_name)
        own = eqx.tree_at(where, layer, weight)
        if getattr(layer, "bias", None) is not None:
            own = eqx.tree_at(lambda n: n.bias, own, jnp.zeros((), weight.dtype))

        def apply(x: Array) -> Array:
            return own(x.reshape(input_shape)).ravel()

        zero = jnp.zeros(size, weight.dtype)
        _, forward = jax.linearize(apply, zero)
        pullback = jax.linear_transpose(forward, zero)
        return LinearMap(forward, lambda y: jnp.conj(pullback(jnp.conj(y))[0]))

    return linear


def check_fits(
    layer: Any, weight_name: str, weight: Any, input_shape: tuple[int, ...]
) -> None:
    """Raises if the layer does not take inputs of this shape."""

    def image(weight: Array) -> Array:
        linear = linear_part(layer, weight_name, input_shape)(weight)
        return linear.forward(jnp.zeros(math.prod(input_shape), weight.dtype))

    try:
        jax.eval_shape(image, weight)
    except Exception as error:
        raise ValueError(
            f"`input_shape={input_shape}` is no input of this {type(layer).__name__}: "
            "it must be the full shape without batch, `(channels, *spatial)`, of an "
            "input that gives one array."
        ) from error
