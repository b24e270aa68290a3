"""Axes of a weight: what users may give, and which they are."""

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex, TypeAlias


Axis: TypeAlias = None | str | int | tuple[int, ...]
"""`None`, `"unit"`, an axis or several axes."""

AxisLike: TypeAlias = None | str | SupportsIndex | Sequence[SupportsIndex]
"""What an `Axis` may be given as."""


def check_axis(axis: AxisLike) -> Axis:
    """`axis` in its canonical form, or an error that lists the forms there are."""
    if axis is None or isinstance(axis, str) and axis == "unit":
        return axis
    single = isinstance(axis, str | SupportsIndex)
    entries: Sequence[Any] = [axis] if single else axis
    try:
        axes = tuple(_index(a) for a in entries)
    except TypeError:
        axes = None
    if axes is None or len(set(axes)) != len(axes):
        raise ValueError(
            '`axis` must be None (one norm for the whole weight), "unit" (every axis '
            f"but the first), an int, or a tuple of different ints, got {axis!r}."
        )
    return axes[0] if single else axes


def _index(axis: Any) -> int:
    if isinstance(axis, bool):
        raise TypeError("a boolean is no axis")
    return operator.index(axis)


def resolve_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """The non-negative axes that one norm of a weight of rank `ndim` is taken over."""
    if axis is None:
        return tuple(range(ndim))
    if isinstance(axis, str):
        if ndim == 0:
            raise ValueError(
                '`axis="unit"` needs a weight of rank 1 or more, got a scalar.'
            )
        return tuple(range(1, ndim))
    entries = axis if isinstance(axis, tuple) else (axis,)
    if any(not -ndim <= a < ndim for a in entries):
        raise ValueError(
            f"`axis={axis!r}` is out of range for a weight of rank {ndim}, whose axes "
            f"are 0 to {ndim - 1}."
        )
    axes = tuple(a % ndim for a in entries)
    if len(set(axes)) != len(axes):
        raise ValueError(f"`axis={axis!r}` names an axis of rank {ndim} twice.")
    return axes
