r"""Lipschitz bounds of Equinox's layers, one rule for each.

A rule takes a layer and the shape of its input, which may be `None`, and gives an upper
bound in the l2 norm: a number, or an array where it depends on weights. Layers that
hold other layers are in `_bound.py`.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from .._linalg import attained, gram, lattice_norm, of_matrix, or_fault, widen
from .._tree import convolution_of, repeats
from ._activations import GroupSort, MaxMin
from ._slopes import NoBound, Shape


Bound: TypeAlias = float | Float[Array, ""]
Rule: TypeAlias = Callable[[Any, Shape], Bound]


@jax.jit
def _matrix_norm(weight: Inexact[Array, "out in"]) -> Float[Array, ""]:
    matrix = widen(weight)
    constant = lax.stop_gradient(matrix)
    top = gram(constant)
    top = top._replace(value=or_fault(top.value, constant))
    return attained(of_matrix, matrix, top)


def _linear(layer: eqx.nn.Linear, input_shape: Shape) -> Bound:
    del input_shape
    _check_rank(layer.weight, 2)
    return _matrix_norm(layer.weight)


def _conv(layer: eqx.nn.Conv, input_shape: Shape) -> Bound:
    _check_rank(layer.weight, layer.num_spatial_dims + 2)
    if input_shape is not None and len(input_shape) != layer.num_spatial_dims + 1:
        raise NoBound(
            f"takes images with {layer.num_spatial_dims} spatial axes, and "
            f"`input_shape` is {input_shape}: give `(channels, *spatial)`."
        )
    norm = lattice_norm(layer.weight, convolution_of(layer))
    times = repeats(layer, input_shape)
    if times is None:
        raise NoBound(
            f"pads with `padding_mode={layer.padding_mode!r}`, so that its bound "
            "depends on the size of the image: give `input_shape`."
        )
    return norm if times == 1 else norm * _root_up(times)


def _conv_transpose(layer: eqx.nn.ConvTranspose, input_shape: Shape) -> Bound:
    del input_shape
    _check_rank(layer.weight, layer.num_spatial_dims + 2)
    return lattice_norm(layer.weight, convolution_of(layer))


def _check_rank(weight: Array, rank: int) -> None:
    if weight.ndim != rank:
        raise NoBound(
            f"has a weight of rank {weight.ndim}, where one layer has rank {rank}: "
            "bound the layers of a stack one by one, with `eqx.filter_vmap`."
        )


def _max_pool(layer: eqx.nn.Pool, input_shape: Shape) -> Bound:
    # A window's maximum moves no more than what is in the window does; an entry counts
    # in as many windows as it is in.
    del input_shape
    axes = zip(layer.kernel_size, layer.stride, strict=True)
    return _root_up(math.prod(-(-k // s) for k, s in axes))


def _sum_pool(layer: eqx.nn.Pool, input_shape: Shape) -> Bound:
    del input_shape
    return _root_up(_square_of_sums(layer))


def _avg_pool(layer: eqx.nn.Pool, input_shape: Shape) -> Bound:
    del input_shape
    return _root_up(_square_of_sums(layer), math.prod(layer.kernel_size))


def _square_of_sums(layer: eqx.nn.Pool) -> int:
    # Along an axis, the symbol of a row of ones is largest at frequency zero, where its
    # entries are the numbers of taps in each phase of the stride.
    axes = zip(layer.kernel_size, layer.stride, strict=True)
    return math.prod(sum(len(range(r, k, s)) ** 2 for r in range(s)) for k, s in axes)


def _pool(layer: eqx.nn.Pool, input_shape: Shape) -> Bound:
    if layer.operation is lax.max or layer.operation is lax.min:
        return _max_pool(layer, input_shape)
    if layer.operation is lax.add:
        return _sum_pool(layer, input_shape)
    raise NoBound(
        "has an `operation` other than `lax.max`, `lax.min` and `lax.add`, for which "
        "no Lipschitz bound is known."
    )


def _adaptive_pool(layer: eqx.nn.AdaptivePool, input_shape: Shape) -> Bound:
    # The windows do not overlap.
    if layer.operation is jnp.max or layer.operation is jnp.min:
        return 1.0
    if layer.operation is not jnp.mean:
        raise NoBound(
            "has an `operation` other than `jnp.max`, `jnp.min` and `jnp.mean`, for "
            "which no Lipschitz bound is known."
        )
    if input_shape is None:
        return 1.0
    axes = zip(input_shape[1:], layer.target_shape, strict=True)
    size = math.prod(max(n // target, 1) for n, target in axes)
    return _root_up(size, size)


def _prelu(layer: eqx.nn.PReLU, input_shape: Shape) -> Bound:
    del input_shape
    slopes = jnp.abs(widen(layer.negative_slope))
    return jnp.max(slopes, initial=1)


def _one(layer: Any, input_shape: Shape) -> Bound:
    del layer, input_shape
    return 1.0


def _root_up(square: int, divisor: int = 1) -> float:
    """`sqrt(square) / divisor`, rounded up."""
    root = math.sqrt(square) / divisor
    while Fraction(root) ** 2 * divisor**2 < square:
        root = math.nextafter(root, math.inf)
    return root


def _refuse(reason: str) -> Rule:
    def rule(layer: Any, input_shape: Shape) -> Bound:
        del input_shape
        name = type(layer).__name__
        raise NoBound(
            f"is a {name}, and {reason} For a bound of your own use "
            f"`@eqxreg.lipschitz_bound.register({name})`."
        )

    return rule


def _table(*rows: tuple[Rule, Sequence[type]]) -> dict[type, Rule]:
    return {layer_type: rule for rule, types in rows for layer_type in types}


LAYER_RULES: dict[type, Rule] = _table(
    (_linear, [eqx.nn.Linear]),
    (_conv, [eqx.nn.Conv]),
    (_conv_transpose, [eqx.nn.ConvTranspose]),
    (_max_pool, [eqx.nn.MaxPool1d, eqx.nn.MaxPool2d, eqx.nn.MaxPool3d]),
    (_avg_pool, [eqx.nn.AvgPool1d, eqx.nn.AvgPool2d, eqx.nn.AvgPool3d]),
    (_pool, [eqx.nn.Pool]),
    (_adaptive_pool, [eqx.nn.AdaptivePool]),
    (_prelu, [eqx.nn.PReLU]),
    (_one, [eqx.nn.Dropout, eqx.nn.Identity, GroupSort, MaxMin]),
    (
        _refuse(
            "the slope of a normalisation grows as 1/sqrt(eps) where its input is "
            "nearly constant, so that its bound is of no use. Leave it out."
        ),
        [eqx.nn.LayerNorm, eqx.nn.RMSNorm, eqx.nn.GroupNorm],
    ),
    (
        _refuse(
            "its slope depends on the batch in training, and on its state in "
            "inference, when it is an affine map: fold it into the layer before it."
        ),
        [eqx.nn.BatchNorm],
    ),
    (
        _refuse(
            "dot-product attention is not globally Lipschitz (Kim, Papamakarios and "
            "Mnih, 2021): its slope grows with its input."
        ),
        [eqx.nn.MultiheadAttention],
    ),
    (
        _refuse(
            "it multiplies gates by its state, so that its slope grows with the state."
        ),
        [eqx.nn.GRUCell, eqx.nn.LSTMCell],
    ),
    (
        _refuse(
            "its input is a token, not a vector. Bound the network that comes after it."
        ),
        [eqx.nn.Embedding],
    ),
    (
        _refuse("its arrays are not in place. Call it, and bound what it returns."),
        [eqx.nn.Shared],
    ),
)
"""A rule for each layer type, of which its subclasses are too."""
