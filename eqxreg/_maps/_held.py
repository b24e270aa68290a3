"""What a wrapper keeps of its maps: their arrays as constants, whatever is put there.

Optimisers and averages go by floating arrays, and know nothing of maps. So of all that
a map holds only what it says is `trained` stays a floating array.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu

from .._bits import Constant, is_constant
from ._base import Number, Parametrization, Schedule


class HeldMaps(tuple[Parametrization, ...]):
    """The maps of a wrapper. To a tree it is a tuple whose maps hold no floating arrays
    but those that they train: one that is put there, by `eqx.tree_at`, is made a
    constant, so that a new bound is a new value and no new program."""

    def __new__(cls, maps: Iterable[Any]):
        return super().__new__(cls, [_held(p) for p in maps])

    def __getnewargs__(self) -> tuple[tuple[Parametrization, ...]]:
        return (tuple(self),)


def _flatten_with_keys(maps: HeldMaps):
    return tuple((jtu.SequenceKey(i), p) for i, p in enumerate(maps)), None


jtu.register_pytree_with_keys(
    HeldMaps,
    _flatten_with_keys,
    lambda _, maps: HeldMaps(maps),
    lambda maps: (tuple(maps), None),
)


_ALREADY = (Constant, Number, Schedule)


def _held(node: Any) -> Any:
    """`node` with constants in the place of floating arrays."""
    if isinstance(node, Parametrization):
        return _held_map(node)
    if eqx.is_inexact_array(node):
        return Constant.of(node)
    if node is None or isinstance(node, _ALREADY):
        return node
    # Trees are built of other things than arrays too; of these there is none to hold.
    leaves = jax.tree.leaves(node, is_leaf=_is_one)
    if not any(
        isinstance(x, Parametrization) or eqx.is_inexact_array(x) for x in leaves
    ):
        return node
    inner = lambda x: x if x is node else _held(x)
    return jax.tree.map(inner, node, is_leaf=_is_one)


def _held_map(p: Parametrization) -> Parametrization:
    changed = {}
    for field in dataclasses.fields(p):
        value = vars(p).get(field.name)
        if field.metadata.get("static", False) or field.name in type(p).trained:
            continue
        if (new := _held(value)) is not value:
            changed[field.name] = new
    return _with_fields(p, changed) if changed else p


def _with_fields(p: Parametrization, values: dict[str, Any]) -> Parametrization:
    names = list(values)
    where = lambda p: [getattr(p, name) for name in names]
    is_leaf = lambda x: x is None
    return eqx.tree_at(where, p, [values[name] for name in names], is_leaf=is_leaf)


def _is_one(node: Any) -> bool:
    return is_constant(node) or isinstance(node, Parametrization)
