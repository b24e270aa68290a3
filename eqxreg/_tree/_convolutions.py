"""What is known of Equinox's convolutions as operators, from their attributes."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import equinox as eqx
import numpy as np
from jax import lax

from .._linalg import Convolution


CONVOLUTIONS = (eqx.nn.Conv, eqx.nn.ConvTranspose)

Conv: TypeAlias = eqx.nn.Conv | eqx.nn.ConvTranspose


def convolution_of(layer: Conv) -> Convolution:
    """What a layer is besides its kernel and its padding."""
    transposed = isinstance(layer, eqx.nn.ConvTranspose)
    return Convolution(
        tuple(layer.stride), tuple(layer.dilation), layer.groups, transposed
    )


def repeats(layer: Conv, input_shape: tuple[int, ...] | None) -> int | None:
    """By how much padding can enlarge the square of a norm: how often it repeats an
    entry of the image, multiplied over the axes. `None` if that depends on a shape that
    is not given."""
    if isinstance(layer, eqx.nn.ConvTranspose):
        # A circular one too: Equinox builds those for `SAME` padding only, where the
        # output is one period of the convolution of a periodic image.
        return 1
    extents = [
        d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)
    ]
    padding = _explicit_padding(layer, extents, input_shape)
    mode, unit = layer.padding_mode, all(s == 1 for s in layer.stride)
    if mode == "ZEROS" or (padding and all(tuple(p) == (0, 0) for p in padding)):
        return 1
    if padding and mode == "CIRCULAR" and unit:
        # A part of a circulant matrix, if no more comes out than goes in.
        if all(sum(p) < extent for p, extent in zip(padding, extents, strict=True)):
            return 1
    if padding is None or input_shape is None:
        return None
    if 0 in input_shape:
        return 1
    axes = zip(input_shape[1:], extents, padding, layer.stride, strict=True)
    return math.prod(_repeats_along_axis(mode, *axis) for axis in axes)


def _explicit_padding(
    layer: eqx.nn.Conv, extents: list[int], input_shape: tuple[int, ...] | None
) -> Sequence[tuple[int, int]] | None:
    """The amounts of padding; `None` if they depend on a shape that is not given."""
    if not isinstance(layer.padding, str):
        return layer.padding
    if input_shape is not None:
        sizes = input_shape[1:]
    elif layer.padding == "VALID" or all(s == 1 for s in layer.stride):
        # Any size will do.
        sizes = extents
    else:
        return None
    pads = lax.padtype_to_pads(sizes, extents, layer.stride, layer.padding)
    # Some versions of JAX give NumPy's integers.
    return [(int(low), int(high)) for low, high in pads]


def _repeats_along_axis(
    padding_mode: str, size: int, extent: int, pads: tuple[int, int], stride: int
) -> int:
    steps = (size + sum(pads) - extent) // stride
    mode: Any = {"REFLECT": "reflect", "REPLICATE": "edge", "CIRCULAR": "wrap"}
    source = np.pad(np.arange(size), pads, mode=mode[padding_mode])
    copies = int(np.bincount(source[: stride * steps + extent]).max(initial=1))
    if padding_mode != "CIRCULAR":
        return copies
    # The output is a stretch of a periodic sequence. Where the stride does not divide
    # the size, its period comes from several of the image's.
    periods = stride // math.gcd(size, stride)
    period = size * periods // stride
    return min(copies, periods * -(-(steps + 1) // period))
