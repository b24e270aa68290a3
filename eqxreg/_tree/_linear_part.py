"""The linear part of a layer, as a function of its weight.

A convolution is a matrix that nobody writes down: what is known of it is its product
with an image, and JAX transposes that. For images of any size it is a part of an
infinite one, and something finite with a norm as large stands in for it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._linalg import LinearMap, torus_map, torus_size
from ._convolutions import CONVOLUTIONS, convolution_of, repeats


InputShape: TypeAlias = tuple[int, ...] | Literal["any"]
"""The shape of an input without batch, or every one that a layer takes."""

InputShapeLike: TypeAlias = Sequence[int] | Literal["any"]
"""What an `InputShape` may be given as."""


class Operator(NamedTuple):
    """A layer, but for its weight, as what makes a linear map of a weight."""

    linear: Callable[[Array], LinearMap]
    """The map, which depends on the weight linearly."""
    size: int
    """The dimension of its domain."""


def operator_of(
    layer: Any, weight_name: str, weight_shape: Sequence[int], input_shape: InputShape
) -> Operator | None:
    """What a layer does with a weight of this shape; `None` if that is the product with
    the weight as a matrix."""
    if input_shape != "any":
        linear = linear_part(layer, weight_name, input_shape)
        return Operator(linear, math.prod(input_shape))
    if isinstance(layer, eqx.nn.Linear):
        return None
    convolution = convolution_of(layer)
    size = torus_size(weight_shape, convolution)
    return Operator(lambda weight: torus_map(weight, convolution), size)


def check_input_shape(input_shape: Any) -> InputShape:
    """`input_shape` as `"any"` or a tuple of ints, or an error."""
    if isinstance(input_shape, str) and input_shape == "any":
        return "any"
    entries = tuple(input_shape) if isinstance(input_shape, tuple | list) else ()
    are_ints = [isinstance(n, int | np.integer) for n in entries]
    if not entries or not all(are_ints) or min(entries) < 0:
        raise ValueError(
            "`input_shape` must be the full shape of an input without batch, "
            "`(channels, *spatial)`, as non-negative ints, or for images of every size "
            f'"any", got {input_shape!r}.'
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
        return LinearMap.of(forward, zero)

    return linear


def check_fits(
    layer: Any, weight_name: str, weight: Any, input_shape: InputShape
) -> None:
    """Raises if the layer does not take inputs of this shape, or gives nothing for
    them; for `"any"`, if no norm is the bound for all of them."""
    if input_shape == "any":
        _check_takes_any(layer, weight_name)
        return
    size = math.prod(input_shape)

    def image(weight: Array) -> Array:
        linear = linear_part(layer, weight_name, input_shape)(weight)
        return linear.forward(jnp.zeros(size, weight.dtype))

    try:
        found = jax.eval_shape(image, weight)
    except Exception as error:
        raise ValueError(
            f"`input_shape={input_shape}` is no input of this {type(layer).__name__}: "
            "it must be the full shape without batch, `(channels, *spatial)`, of an "
            "input that gives one array."
        ) from error
    if found.size == 0 and weight.size > 0 and size > 0:
        raise ValueError(
            f"`input_shape={input_shape}` is too small for this "
            f"{type(layer).__name__}: its kernel does not fit in, and nothing comes "
            "out. Give the shape of an input that it fits in, or pad the layer."
        )


def _check_takes_any(layer: Any, weight_name: str) -> None:
    known = (eqx.nn.Linear, *CONVOLUTIONS)
    cls = next((c for c in known if isinstance(layer, c)), None)
    name = type(layer).__name__
    # A subclass with a call of its own may be anything.
    as_known = cls is not None and type(layer).__call__ is cls.__call__
    if not as_known or weight_name != "weight":
        raise ValueError(
            '`input_shape="any"` is for the weight of an `eqx.nn.Conv`, '
            f"`eqx.nn.ConvTranspose` or `eqx.nn.Linear`, got `{weight_name}` of a "
            f"{name}. Give the full shape of an input, or leave `input_shape` out for "
            "the norm of the weight as a matrix."
        )
    if isinstance(layer, CONVOLUTIONS) and repeats(layer, None) is None:
        raise ValueError(
            f'`input_shape="any"` is no bound for this {name}: with '
            f"`padding_mode={layer.padding_mode!r}` entries of the image are repeated, "
            "and the norm depends on its size. Give the full shape of an input, "
            "`(channels, *spatial)`, or pad with zeros."
        )
