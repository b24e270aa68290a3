"""The spectral norm of a weight, and that of a layer as an operator."""

import math
from typing import Any

import equinox as eqx
from jax import lax
from jaxtyping import Array, Float

from .._linalg import attained, fixed_vector, lattice_norm, real_dtype, widen
from .._maps import check_dtype, from_start, spectral_norm
from .._models import bake
from .._tree import (
    CONVOLUTIONS,
    InputShapeLike,
    check_fits,
    check_input_shape,
    convolution_of,
    is_wrapper,
    linear_part,
)


def operator_norm(
    layer: Any, input_shape: InputShapeLike | None = None
) -> Float[Array, ""]:
    r"""The norm of a layer's linear part as an operator: the largest factor by which it
    stretches an input, in the Euclidean norm. The bias does not matter.

    For a convolution this is the norm of the convolution itself, with its stride,
    padding, dilation and groups, and not that of its kernel as a matrix. It is found
    from products with images, by `jax.linear_transpose`; from below, and to a relative
    error of 1e-3 at most. Differentiable in the weight.

    It grows with the image. With `"any"` it is a bound for images of every size, from
    above: the norm on an infinite image, to 0.03 % for one spatial axis, 0.5 % for two
    and 1.5 % for three, which large images come near to.

    **Arguments:**

    - `layer`: an `eqx.nn.Linear`, `eqx.nn.Conv` or `eqx.nn.ConvTranspose`, or a wrapper
        around one, without state.
    - `input_shape`: the full shape of an input without batch, `(channels, *spatial)`,
        or `"any"`, if the layer pads with zeros, or `CIRCULAR` without a stride. Not
        needed for a linear layer.

    **Returns:**

    A real scalar of the weight's precision.

    **Raises:**

    - `TypeError`: if the layer is none of these.
    - `ValueError`: if `input_shape` is missing, no input of this layer or so small that
        nothing comes out, or `"any"` where there is no such bound.

    !!! example

        ```python
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> conv = eqx.nn.Conv2d(1, 1, 3, padding=1, key=jax.random.key(0))
        >>> conv = eqx.tree_at(lambda c: c.weight, conv, jnp.ones((1, 1, 3, 3)))
        >>> norm = eqxreg.operator_norm(conv, input_shape=(1, 32, 32))
        >>> print(norm.round(2), eqxreg.spectral_norm(conv.weight).round(2))
        8.95 3.0
        >>> print(eqxreg.operator_norm(conv, input_shape="any").round(2))
        9.04

        ```
    """
    if is_wrapper(layer):
        layer = bake(layer)
    if isinstance(layer, eqx.nn.Linear):
        return spectral_norm(layer.weight)
    if not isinstance(layer, CONVOLUTIONS):
        raise TypeError(
            "`operator_norm` is of an `eqx.nn.Linear`, `eqx.nn.Conv` or "
            f"`eqx.nn.ConvTranspose`, got a {type(layer).__name__}. For whole models "
            "use `eqxreg.lipschitz_bound`."
        )
    if input_shape is None:
        raise ValueError(
            "`operator_norm` of a convolution needs `input_shape`, the full shape of "
            'an input without batch, `(channels, *spatial)`, or "any" for a bound for '
            "images of every size."
        )
    shape = check_input_shape(input_shape)
    check_dtype(layer.weight)
    check_fits(layer, "weight", layer.weight, shape)
    if shape == "any":
        bound = lattice_norm(layer.weight, convolution_of(layer))
        return bound.astype(real_dtype(layer.weight.dtype))
    weight = widen(layer.weight)
    linear = linear_part(layer, "weight", shape)
    start = fixed_vector(math.prod(shape), weight.dtype)
    # The singular values of a convolution are close to each other at the top.
    constant = linear(lax.stop_gradient(weight))
    top = from_start(constant, start, steps=32, cycles=16)
    value = attained(linear, weight, top)
    return value.astype(real_dtype(layer.weight.dtype))
