"""Dotted names of arrays within a layer, such as `"query_proj.weight"`.

A name is relative to the plain layer: wrappers on the way are looked through.
"""

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax.numpy as jnp

from ._bits import thawed
from ._layers import is_tied, is_wrapper


Path: TypeAlias = tuple[str | int, ...]


def parse(name: str) -> Path:
    """`"layers.0.weight"`, or `"layers[0].weight"`, as `("layers", 0, "weight")`."""
    steps = [s for s in re.split(r"[.\[\]]+", name) if s]
    return tuple(int(s) if s.isdigit() else s for s in steps)


def steps_of(entries: Sequence[Any]) -> Path:
    """A key path of JAX as a path."""
    names = ("name", "key", "idx")
    return tuple(
        next(getattr(entry, name) for name in names if hasattr(entry, name))
        for entry in entries
    )


def check_names(weight_name: Any) -> str | tuple[str, ...]:
    """A name, or several different ones; else an error."""
    names = (weight_name,) if isinstance(weight_name, str) else weight_name
    several = isinstance(names, Sequence) and len(set(names)) == len(names) > 0
    if not several or not all(isinstance(n, str) and parse(n) for n in names):
        raise ValueError(
            '`weight_name` must be a name such as "weight", a dotted path such as '
            '"query_proj.weight", or a sequence of different ones, got '
            f"{weight_name!r}."
        )
    return weight_name if isinstance(weight_name, str) else tuple(names)


def names_of(weight_name: str | tuple[str, ...]) -> tuple[str, ...]:
    """The names that a wrapper's `weight_name` stands for."""
    return (weight_name,) if isinstance(weight_name, str) else weight_name


def unwrapped(node: Any) -> Any:
    """The plain layer, as it is stored, within any number of wrappers."""
    while is_wrapper(node):
        node = node.layer
    return node


def child(node: Any, step: str | int) -> Any:
    """The attribute, item or entry `step` of a plain node."""
    if isinstance(step, int) or isinstance(node, dict):
        return node[step]
    return getattr(node, step)


def nodes_along(layer: Any, name: str) -> list[Any]:
    """The nodes on the way to the array `name`, wrappers still on: `layer` first, the
    array's owner last. Raises, naming what there is, if there is no such array."""
    nodes = [layer]
    for step in parse(name):
        node = unwrapped(nodes[-1])
        try:
            nodes.append(child(node, step))
        except (AttributeError, LookupError, TypeError):
            raise ValueError(
                f'`weight_name="{name}"`: {type(node).__name__} has no `{step}`. '
                f"{_what_there_is(node)}"
            ) from None
    return nodes[:-1]


def find_array(layer: Any, name: str) -> tuple[Any, str, Any]:
    """The owner of the raw array `name`, its name there, and the array itself, which
    may be tied to another. Raises if it is no floating or complex array."""
    *_, owner = nodes_along(layer, name)
    owner, step = unwrapped(owner), parse(name)[-1]
    leaf = thawed(child(owner, step))
    kind = type(owner).__name__
    if leaf is None:
        raise ValueError(
            f'`weight_name="{name}"` is None in this {kind}. Build the layer with it, '
            f"or name another array. {_what_there_is(owner)}"
        )
    dtype = getattr(leaf, "dtype", None)
    inexact = dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
    if not (inexact or is_tied(leaf)):
        what = f"a {type(leaf).__name__}" if dtype is None else f"an array of {dtype}"
        raise TypeError(
            f'`weight_name="{name}"` must name a floating or complex array, and in '
            f"this {kind} it is {what}. {_what_there_is(owner)}"
        )
    return owner, str(step), leaf


def _what_there_is(node: Any) -> str:
    fields = vars(node) if isinstance(node, eqx.Module) else {}
    arrays = [f'"{k}"' for k, v in fields.items() if eqx.is_inexact_array(v)]
    if arrays:
        return f"It has {', '.join(arrays)}."
    inside = [f'"{k}"' for k, v in fields.items() if isinstance(v, eqx.Module)]
    if inside:
        return (
            f"It has no arrays itself; they are in {', '.join(inside)}, as in "
            f'"{inside[0][1:-1]}.weight".'
        )
    return "It has no arrays."
